"""The benchmark's rows in CUDA graphs, with a stand-in for graphs that runs what was captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import case, row, run

from bench.cases.case import NotRunError
from bench.cases.workload import Workload, WrongError
from bench.rows import registry, runs
from bench.rows.registry import BASELINE, NAMES, OUR_GRAPH, STOCK_GRAPH, Row
from bench.rows.runs import ClipAndStep, Ours


class Graphs:
    """Stands in for ``torch.cuda``'s: what is captured does not run then, but at each replay."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: Any = None
        self.log: list[str] = []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        for cls in (ClipAndStep, Ours):
            monkeypatch.setattr(cls, "step", self.replayed(cls.step))

    @contextlib.contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def replayed(self, step: Callable[[Any], None]) -> Callable[[Any], None]:
        def stepped(own: Any) -> None:
            self.log.append("captured" if self.capturing else "run")
            if self.capturing is None:
                step(own)
            else:
                self.capturing.replay = lambda: step(own)

        return stepped


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(monkeypatch)


@pytest.mark.parametrize("name", [STOCK_GRAPH, OUR_GRAPH])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_it_starts_where_the_others_do(name: str, dtypes: str, graphs: Graphs) -> None:
    """Whatever the steps before the capture moved, and on the gradients that each step is given."""
    found = run(case(dtypes=dtypes), row(name), row(BASELINE))
    assert found[name].status == "ok", found[name].reason
    assert 0 < found[name].difference < (1e-7 if dtypes == "float32" else 1e-3)
    assert found[BASELINE].status == "ok"
    assert graphs.log[: runs.WARM_UP + 1] == ["run"] * runs.WARM_UP + ["captured"]


@pytest.mark.parametrize("method", ["reset", "reset_counts"])
def test_what_is_not_set_back_is_seen(
    method: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload(case())
    monkeypatch.setattr(Workload, method, lambda *args: None)
    captured = row(STOCK_GRAPH).start(work)
    for factor in work.factors:
        captured.prepare(work.new_grads(factor))
        captured.step()
        captured.release()
    with pytest.raises(WrongError):
        captured.difference()


def test_gradients_stay_in_place(graphs: Graphs) -> None:
    work = Workload(case())
    first, second = row(STOCK_GRAPH).start(work), row(OUR_GRAPH).start(work)
    for captured in (first, second):
        given = work.new_grads(0.5)
        captured.prepare(given)
        captured.release()
        held = [p.grad for p in captured.params]
        assert all(a is b for a, b in zip(held, work.fixed_grads, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(held, given, strict=True))


def test_a_step_of_another_mode_is_not_captured(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(own: Ours) -> None:
        if "captured" in graphs.log:
            raise NotRunError("not served: it cannot be captured")

    monkeypatch.setattr(Ours, "check", check)
    found = run(case(), row(OUR_GRAPH))[OUR_GRAPH]
    assert (found.status, found.reason) == ("not run", "not served: it cannot be captured")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    found = run(case(device="cuda"))
    compiled = {each.name for each in registry.ROWS if each.per_tensor}
    failed = {r.name: r.reason for r in found.values() if r.status != "ok"}
    assert failed.keys() <= compiled, failed
    for name in found.keys() - failed.keys():
        assert found[name].median_ms > 0
        assert found[name].host_us > 0
        assert found[name].host_ratio > 0
        assert found[name].kernels
    # Of what the host enqueues one by one, the GPU's own part is far less than the host's.
    assert 1e3 * found[BASELINE].median_ms < found[BASELINE].host_us
    assert found[OUR_GRAPH].host_us < found[BASELINE].host_us


def test_without_fused_there_is_no_graph_of_it(graphs: Graphs) -> None:
    found = run(case("RMSprop"), row(STOCK_GRAPH))[STOCK_GRAPH]
    assert found.reason == "torch.optim.RMSprop has no fused=True"


def _names(chosen: tuple[Row, ...]) -> set[str]:
    return {each.name for each in chosen}


def test_rows_of_a_device() -> None:
    on_cpu, on_gpu = (_names(registry.for_device(registry.ROWS, d)) for d in ("cpu", "cuda:1"))
    assert set(NAMES) - on_cpu == {STOCK_GRAPH, OUR_GRAPH}
    assert set(NAMES) - on_gpu == {"clip + for-loop"}


def test_a_whole_name_is_that_row_alone() -> None:
    assert _names(registry.choose(BASELINE)) == {BASELINE}
    assert _names(registry.choose("CUDA graph")) == {STOCK_GRAPH, OUR_GRAPH}
    assert _names(registry.choose("eager, fused")) > {BASELINE, STOCK_GRAPH}
