"""What is measured, and the JSON files that hold it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass
class RowResult:
    """A row of a case; what was not measured, or means nothing there, is None.

    Attributes:
        status: "ok", "wrong", "not run" or "failed"; without "ok" there are no times.
        reason: why not "ok".
        difference: the largest of any parameter from float64, after the steps of the check; of
            training, the largest of any loss from the reference's.
        median_ms: of a step, until the device is done (``conclude``); then the quartiles.
        host_us: microseconds of a step until the host may go on, likewise.
        host_ratio: how many times as fast as the baseline's host, where that is timed by itself.
        ratio: how many times as fast as the baseline, over the rounds, likewise.
        gbps: gigabytes per second: what the step must move, divided by the median.
        share_of_limit: the limit's time divided by the row's, over the rounds, likewise.
        kernels: launches in a step on a GPU.
        extra_bytes: the most memory that a step holds besides its tensors.
        first_cold_s: the first step in a fresh process, with empty caches on disk.
        first_warm_s: the same, with the caches that the former left behind.
        update_ms: of clip and step within a training step.
        final_loss: of training, the mean of the last steps.
        param_difference: of training, the largest of any parameter from the reference's.
        clipped: of training, the share of steps in which gradients were clipped.
    """

    name: str
    status: str = "ok"
    reason: str = ""
    difference: float | None = None
    median_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    host_us: float | None = None
    host_ratio: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    share_of_limit: float | None = None
    kernels: int | None = None
    extra_bytes: int | None = None
    first_cold_s: float | None = None
    first_warm_s: float | None = None
    update_ms: float | None = None
    final_loss: float | None = None
    param_difference: float | None = None
    clipped: float | None = None

    def fail(self, status: str, reason: str) -> None:
        """Say why there are no times."""
        self.status, self.reason = status, reason
        self.median_ms = self.lower_ms = self.upper_ms = self.host_us = None


@dataclass
class CaseResult:
    """All rows of a case.

    Attributes:
        case: ``Case.to_json``.
        title: the case in a line.
        bytes_per_parameter: what a step must move.
        reason: why the case was not measured at all, or "".
        rounds: how many there were.
        processes: in how many.
        host_hidden: whether times are a GPU's alone, and the host's were taken by themselves.
    """

    case: dict[str, Any]
    title: str
    bytes_per_parameter: float = 0.0
    reason: str = ""
    rounds: int = 0
    processes: int = 0
    host_hidden: bool = False
    rows: list[RowResult] = field(default_factory=list)

    def row(self, name: str) -> RowResult | None:
        """The row of that name, if it was measured."""
        return next((r for r in self.rows if r.name == name and r.median_ms is not None), None)


@dataclass
class Report:
    """What a command measured."""

    command: str
    environment: dict[str, Any]
    method: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)

    def exit_code(self) -> int:
        """1 if a row was wrong or nothing was measured, else 0."""
        found = [row for case in self.cases for row in case.rows]
        wrong = any(row.status == "wrong" for row in found)
        return int(wrong or not any(row.median_ms is not None for row in found))

    def write(self, path: Path) -> None:
        """Write JSON; its folder is made if need be.

        A process that is ended meanwhile leaves what there was before.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")
        unfinished.replace(path)


def read(path: Path) -> Report:
    """Read what ``Report.write`` wrote, by an older version too.

    Raises:
        ValueError: it is no such file.
    """
    try:
        report: Report = _made(Report, json.loads(path.read_text()))
        cases: list[Any] = report.cases  # dictionaries so far, as their rows
        report.cases = [_made(CaseResult, case) for case in cases]
        for case in report.cases:
            rows: list[Any] = case.rows
            case.rows = [_made(RowResult, row) for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return report


def _made(cls: Any, values: dict[str, Any]) -> Any:
    """An object of ``cls``; what it no longer has is left out."""
    known = {f.name for f in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in known})


def _rounded(value: Any) -> Any:
    """Five digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
