"""What the benchmark makes of the times of several processes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bench.measuring.conclude import conclude
from bench.measuring.measure import FirstStep, Part
from bench.measuring.timing import Times
from bench.reporting.results import CaseResult, RowResult
from bench.reporting.tables import case_table
from bench.rows.registry import BASELINE, LIMIT, OURS


def part(base: float, ours: float, rounds: int = 5) -> Part:
    """Times in which each row takes as long as ever; the limit takes 1 s."""
    seconds = {BASELINE: base, OURS: ours, LIMIT: 1.0}
    times = {name: Times([s] * rounds, [s] * rounds) for name, s in seconds.items()}
    rows = [RowResult(name) for name in seconds]
    return Part([*rows, RowResult("clip + foreach", "failed", "no luck")], times, 32.0)


def concluded(*parts: Part, hidden: bool = False) -> tuple[CaseResult, dict[str, RowResult]]:
    about: dict[str, Any] = {"elements": 10**9}
    result = CaseResult(about, "a case", host_hidden=hidden)
    conclude(result, parts, {OURS: FirstStep(2.0, 1.0)})
    return result, {row.name: row for row in result.rows}


def test_one_process() -> None:
    result, rows = concluded(part(6.0, 3.0))
    assert (result.rounds, result.processes) == (5, 1)
    ours = rows[OURS]
    assert ours.median_ms == pytest.approx(3000.0)
    assert ours.host_us == pytest.approx(3e6)
    assert ours.ratio == pytest.approx(2.0)
    assert ours.share_of_limit == pytest.approx(1 / 3)
    assert ours.gbps == pytest.approx(32 / 3)
    assert (ours.first_cold_s, ours.first_warm_s) == (2.0, 1.0)
    assert rows["clip + foreach"].median_ms is None
    assert "a case; 32 bytes needed; 5 rounds\n" in case_table(result)
    assert "\nclip + foreach: failed: no luck" in case_table(result)


def test_a_host_by_itself_has_a_ratio() -> None:
    times = part(6.0, 3.0)
    times.times[OURS].host = [1.5] * 5
    result, rows = concluded(times, hidden=True)
    assert (rows[OURS].ratio, rows[OURS].host_ratio) == (pytest.approx(2.0), pytest.approx(4.0))
    assert rows[BASELINE].host_ratio == pytest.approx(1.0)
    assert "host, times" in case_table(result)
    result, rows = concluded(part(6.0, 3.0))
    assert rows[OURS].host_ratio is None
    assert "host, times" not in case_table(result)


def test_several_processes() -> None:
    result, rows = concluded(part(6.0, 3.0), part(6.0, 3.0 / 4))
    assert (result.rounds, result.processes) == (10, 2)
    assert rows[OURS].median_ms == pytest.approx(1500.0)
    assert rows[OURS].ratio == pytest.approx(4.0)
    assert rows[OURS].lower_ms == pytest.approx(750.0)
    assert rows[OURS].upper_ms == pytest.approx(3000.0)


def test_medians_of_rounds() -> None:
    times = part(6.0, 3.0)
    times.times[OURS].device = [1.0, 2.0, 3.0, 100.0, 200.0]
    times.times[BASELINE].device = [3.0, 6.0, 9.0, 300.0, 0.1]
    _, rows = concluded(times)
    assert rows[OURS].median_ms == pytest.approx(3000.0)
    assert rows[OURS].ratio == pytest.approx(3.0)


def test_a_row_that_a_process_lacks() -> None:
    less = part(6.0, 3.0)
    del less.times[LIMIT]
    less.rows[2].fail("failed", "no luck")
    _, rows = concluded(part(6.0, 2.0), less)
    assert rows[OURS].ratio == pytest.approx(math.sqrt(6.0))
    assert rows[OURS].share_of_limit == pytest.approx(1 / 2)
    assert (rows[LIMIT].status, rows[LIMIT].median_ms) == ("failed", None)
