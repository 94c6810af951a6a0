"""How the benchmark takes times: in turns, summarized, of first steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import QUICK, case, row

from bench.cases.workload import Workload
from bench.measuring import measure
from bench.measuring.timing import MOST, Clock, interleave, quartiles
from bench.rows.registry import OURS
from bench.rows.runs import Run


def test_runs_take_turns() -> None:
    taken: list[str] = []

    class Noted(Run):
        def __init__(self, work: Workload, name: str) -> None:
            super().__init__(work)
            self.name = name

        def step(self) -> None:
            assert all(p.grad is not None for p in self.params)
            taken.append(self.name)

    work = Workload(case())
    runs: dict[str, Run] = {name: Noted(work, name) for name in "abc"}
    times, errors = interleave(runs, Clock(torch.device("cpu"), cold=True), 6, 2)
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert [len(t.device) for t in times.values()] == [6, 6, 6]
    assert not errors
    times, _ = interleave(runs, Clock(torch.device("cpu"), cold=False), 6, 2, seconds=60.0)
    assert [len(t.host) for t in times.values()] == [MOST * 6] * 3


def test_median_and_quartiles() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0] * 3


def test_first_steps_are_cold_then_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(QUICK, first_steps=True)
    rows = (row(OURS), row("clip + fused"), row("torch.compile, one graph"))
    found = measure.first_steps(case(shapes=((5,),)), rows, method, tmp_path)
    assert list(found) == [OURS]  # another compiles nothing, the third tensor by tensor
    first = found[OURS]
    assert first.warm < first.cold
    assert first.caches.parent == tmp_path
    assert list(first.caches.rglob("*.so"))
    monkeypatch.setattr(measure, "FIRST_STEP_LIMIT", 0.01)
    first = measure.first_steps(case(), rows, method, tmp_path)[OURS]
    assert (first.cold, first.warm) == (None, None)
