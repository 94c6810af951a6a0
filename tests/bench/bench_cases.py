"""Small cases of the benchmark, and a row that computes something else."""

from __future__ import annotations

from typing import Any

from bench.cases.case import Case
from bench.measuring.conclude import conclude
from bench.measuring.measure import Method, measure
from bench.reporting.results import CaseResult, RowResult
from bench.rows import registry
from bench.rows.registry import Row
from bench.rows.runs import ClipAndStep

SHAPES = ((8, 4), (3,), (70, 130))
QUICK = Method(repetitions=2, seconds=0.0, warmup=1, compile_tensors=0, first_steps=False)


def case(
    optimizer: str = "AdamW", dtypes: str = "float32", shapes: Any = SHAPES, device: str = "cpu"
) -> Case:
    return Case("tiny", shapes, optimizer, dtypes, device)


def run(case: Case, *chosen: Row, method: Method = QUICK) -> dict[str, RowResult]:
    chosen = chosen or registry.for_device(registry.ROWS, case.device)
    hidden = case.device.startswith("cuda")
    result = CaseResult(case.to_json(), case.title, host_hidden=hidden)
    conclude(result, [measure(case, chosen, method, {})], {})
    return {row.name: row for row in result.rows}


def row(name: str) -> Row:
    return next(row for row in registry.ROWS if row.name == name)


class Unclipped(ClipAndStep):
    """Clips nothing."""

    def step(self) -> None:
        self.optimizer.step()
