"""What the benchmark makes of the times of several processes, on cores that lie near and apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.measuring import cores
from bench.measuring.conclude import center, conclude
from bench.measuring.timing import Times
from bench.reporting.results import CaseResult, RowResult
from bench.reporting.tables import case_table
from bench.rows.registry import BASELINE, LIMIT, OURS

NEAR, FAR = 20.0, 200.0


def part(base: float, ours: float, latency: float, rounds: int = 5) -> dict[str, Times]:
    """Times in which each row takes as long as ever; the limit takes 1 s."""
    seconds = {BASELINE: base, OURS: ours, LIMIT: 1.0}
    return {
        name: Times([s] * rounds, [s] * rounds, [latency] * rounds) for name, s in seconds.items()
    }


def concluded(
    *parts: dict[str, Times], hidden: bool = False
) -> tuple[CaseResult, dict[str, RowResult]]:
    about: dict[str, Any] = {"elements": 10**9}
    rows = [RowResult(name) for name in (BASELINE, OURS, LIMIT, "clip + foreach")]
    result = CaseResult(about, "a case", 32.0, host_hidden=hidden, rows=rows)
    conclude(result, parts)
    return result, {row.name: row for row in rows}


def test_rounds_on_cores_apart_do_not_count() -> None:
    result, rows = concluded(part(6.0, 3.0, NEAR), part(6.0, 2.0, FAR, rounds=50))
    assert (result.rounds, result.processes, result.core_latency_ns) == (5, 1, NEAR)
    ours = rows[OURS]
    assert ours.median_ms == pytest.approx(3000.0)
    assert ours.host_us == pytest.approx(3e6)
    assert ours.ratio == pytest.approx(2.0)
    assert ours.ratio_apart == pytest.approx(3.0)
    assert ours.share_of_limit == pytest.approx(1 / 3)
    assert ours.bytes_per_parameter == pytest.approx(96.0)
    assert ours.gbps == pytest.approx(32 / 3)
    assert rows["clip + foreach"].median_ms is None
    assert "a case; 32 bytes needed; 5 rounds, cores 20 ns apart" in case_table(result)


@pytest.mark.parametrize("near", [0, 4])
def test_without_enough_others_all_rounds_count(near: int) -> None:
    parts = [part(6.0, 2.0, FAR, rounds=10)] + [part(6.0, 3.0, NEAR, near)] * bool(near)
    result, rows = concluded(*parts)
    assert result.rounds == 10 + near
    assert result.core_latency_ns == FAR
    assert rows[OURS].ratio_apart == pytest.approx(3.0)
    assert rows[OURS].ratio == pytest.approx((3.0**10 * 2.0**near) ** (1 / (10 + near)))


def test_near_alone() -> None:
    result, rows = concluded(part(6.0, 3.0, 0.0))
    assert result.core_latency_ns == 0.0
    assert rows[OURS].ratio_apart is None
    assert "5 rounds\n" in case_table(result)


def test_a_host_by_itself_has_a_ratio() -> None:
    times = part(6.0, 3.0, 0.0)
    times[OURS].host = [1.5] * 5
    result, rows = concluded(times, hidden=True)
    assert (rows[OURS].ratio, rows[OURS].host_ratio) == (pytest.approx(2.0), pytest.approx(4.0))
    assert rows[BASELINE].host_ratio == pytest.approx(1.0)
    table = case_table(result)
    assert "GPU ms" in table
    assert "host, times" in table
    result, rows = concluded(times)
    assert rows[OURS].host_ratio is None
    assert "GPU" not in case_table(result)


def test_the_mean_of_the_processes() -> None:
    assert center([[2.0, 4.0, 100.0]]) == pytest.approx(4.0)
    assert center([[1.0], [4.0]]) == pytest.approx(2.0)
    assert center([[1.0, 1.0, 1.0], [16.0]]) == pytest.approx(2.0)
    _, rows = concluded(part(6.0, 3.0, NEAR), part(6.0, 3.0 / 4, NEAR))
    assert rows[OURS].ratio == pytest.approx(4.0)
    assert rows[OURS].lower_ms == pytest.approx(750.0)
    assert rows[OURS].upper_ms == pytest.approx(3000.0)


def test_a_row_that_a_process_lacks() -> None:
    less = part(6.0, 3.0, NEAR)
    del less[LIMIT]
    _, rows = concluded(less, part(6.0, 2.0, NEAR))
    assert rows[OURS].ratio == pytest.approx(math.sqrt(6.0))
    assert rows[OURS].share_of_limit == pytest.approx(1 / 2)


def test_core_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    cores._probe.cache_clear()
    asked: list[str] = []
    try:
        assert 0.0 < cores.core_latency(device) < 1e9
        assert cores.core_latency(torch.device("meta")) == 0.0

        def missing(source: str) -> None:
            asked.append(source)
            raise cores.native_build.CompilerError("there is no C++ compiler", "install g++")

        monkeypatch.setattr(cores.native_build, "load", missing)
        cores._probe.cache_clear()
        assert cores.core_latency(device) == cores.core_latency(device) == 0.0
        assert len(asked) == 1
        monkeypatch.undo()
        cores._probe.cache_clear()
        torch.set_num_threads(1)
        assert cores.core_latency(device) == 0.0
    finally:
        cores._probe.cache_clear()
        torch.set_num_threads(threads)
