"""How the benchmark takes times: in turns, summarized, of first steps."""

from __future__ import annotations

from pathlib import Path

import torch
from bench_cases import case

from bench.cases.workload import Workload
from bench.measuring.first_step import first_steps
from bench.measuring.timing import MOST, Clock, interleave, summarize
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
    found = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.lower, found.median, found.upper) == (2.0, 3.0, 4.0)
    assert summarize([7.0]).upper == 7.0


def test_first_steps_are_cold_then_warm(tmp_path: Path) -> None:
    cold, warm = first_steps(case(shapes=((5,),)), OURS, tmp_path, 120.0)
    assert cold is not None
    assert warm is not None
    assert warm < cold
    assert list(tmp_path.rglob("*.so"))
    assert first_steps(case(), OURS, tmp_path, 0.01) == (None, None)
