"""What fails in the benchmark, or computes something else, is said and leaves the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import QUICK, Unclipped, case, row, run

from bench import __main__, plans
from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.measuring.conclude import conclude
from bench.measuring.measure import measure
from bench.measuring.processes import fresh_process
from bench.reporting.results import CaseResult, read
from bench.rows import limit, registry
from bench.rows.registry import BASELINE, LIMIT, OURS, Row
from bench.rows.runs import ClipAndStep, Run
from compileclip.native import native_build


class NotStepped(Run):
    """Does nothing."""

    def step(self) -> None:
        pass


class ToNaN(ClipAndStep):
    """Breaks one element."""

    def step(self) -> None:
        super().step()
        self.work.params[-1][0, 0] = math.nan


class OneTensorLess(ClipAndStep):
    """Forgets a parameter."""

    def step(self) -> None:
        self.params[1].grad = None
        super().step()


class HalfTheRate(ClipAndStep):
    """Steps half as far."""

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.5e-3
        super().step()


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [Unclipped, NotStepped, ToNaN, OneTensorLess, HalfTheRate])
def test_a_wrong_row_is_not_timed(wrong: Callable[[Workload], Run], dtypes: str) -> None:
    found = run(case(dtypes=dtypes), Row("wrong", wrong), row(BASELINE))
    assert found["wrong"].status == "wrong"
    assert found["wrong"].reason.startswith("wrong by ")
    assert found["wrong"].median_ms is None
    assert found[BASELINE].status == "ok"  # the row after it starts from the same numbers


class FailsAtStep(ClipAndStep):
    """Raises after a number of steps."""

    def __init__(self, work: Workload, step: int, error: Exception) -> None:
        super().__init__(work)
        self.left, self.error = step, error

    def step(self) -> None:
        if self.left == 0:
            raise self.error
        self.left -= 1
        super().step()


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_row_that_fails_leaves_the_others(step: int) -> None:
    def start(work: Workload) -> Run:
        return FailsAtStep(work, step, ValueError("no\nluck"))

    found = run(case(), Row("fails", start), row(BASELINE))
    assert (found["fails"].status, found["fails"].reason) == ("failed", "ValueError: no")
    assert found["fails"].median_ms is None
    assert found[BASELINE].ratio == 1.0


def test_out_of_memory_is_said() -> None:
    found = run(case(), Row("huge", lambda work: FailsAtStep(work, 0, MemoryError())), row(LIMIT))
    assert found["huge"].reason == "out of memory"
    assert found[LIMIT].status == "ok"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> None:
        raise native_build.CompilerError("there is no C++ compiler", "install g++")

    monkeypatch.setattr(limit.native_build, "load", missing)
    found = run(case(), row(LIMIT), row(BASELINE))
    assert found[LIMIT].reason == "there is no C++ compiler; install g++"
    assert found[BASELINE].status == "ok"
    assert found[BASELINE].share_of_limit is None


def test_a_mode_that_falls_back_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    for _ in range(2):
        found = run(case(), row(OURS))[OURS]
        assert found.status == "not run"
        assert found.reason == "not served: COMPILECLIP_DISABLE=1 is set"


def test_too_large_and_not_there() -> None:
    with pytest.raises(NotRunError, match=r"needs .* GiB of memory, .* are free"):
        measure(case(shapes=((10**13,),)), registry.ROWS, QUICK, {})
    with pytest.raises(NotRunError, match="no device 'cuda:77'"):
        measure(case(device="cuda:77"), registry.ROWS, QUICK, {})


STEP = ["step", "--shapes", "1x1000", "--rows", "fused,limit", "--repetitions", "4", "--no-plots"]
STEP += ["--no-first-steps", "--processes", "2"]


def test_a_later_process_that_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Times of the first stand, and it is said that there are fewer."""
    monkeypatch.setattr(plans, "fresh_process", lambda: fresh_process(0.001))
    assert __main__.main([*STEP, "--out", str(tmp_path)]) == 0
    assert "fewer times are taken: BrokenProcessPool: " in capsys.readouterr().err
    (found,) = read(tmp_path / "step.json").cases
    assert found.row(BASELINE)
    assert (found.processes, found.reason) == (1, "")


def test_a_row_that_fails_in_a_later_process() -> None:
    """It has no times; the others have those of both."""
    tiny, chosen = case(), (row(BASELINE), row("clip + foreach"))
    result = CaseResult(tiny.to_json(), tiny.title)
    with fresh_process() as process:
        method = replace(QUICK, processes=2)
        parts = [measure(tiny, chosen, method, {})]
        parts.append(process.submit(measure, tiny, chosen, method, {}, trace=False).result())
        with pytest.raises(NotRunError, match="no device"):
            process.submit(measure, case(device="cuda:77"), chosen, method, {}).result()
    del parts[1].times["clip + foreach"]
    parts[1].rows[1].fail("failed", "no luck")
    conclude(result, parts, {})
    assert [r.status for r in result.rows] == ["ok", "failed"]
    assert result.rows[1].median_ms is None
    assert result.processes == 2
    assert result.rounds == 2
