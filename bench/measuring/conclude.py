"""From the times that the processes took to the results of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import geometric_mean, median

from bench.measuring.measure import FirstStep, Part
from bench.measuring.timing import Times, quartiles
from bench.reporting.results import CaseResult
from bench.rows.registry import BASELINE, LIMIT


def conclude(result: CaseResult, parts: Sequence[Part], firsts: Mapping[str, FirstStep]) -> None:
    """Fill in what ``parts`` tell; a row that failed in one of them has no times.

    A time is the median over a process's rounds. Of several processes it is the geometric mean of
    theirs, as in some a row is slower throughout.
    """
    result.rows = parts[0].rows
    result.bytes_per_parameter = parts[0].bytes_per_parameter
    for part in parts[1:]:
        for row, again in zip(result.rows, part.rows, strict=True):
            if row.status == "ok" and again.status != "ok":
                row.fail(again.status, again.reason)
    timed = [part.times for part in parts if part.times]
    result.processes = len(timed)
    result.rounds = sum(len(next(iter(times.values())).device) for times in timed)
    for row in result.rows:
        if row.name in firsts:
            row.first_cold_s, row.first_warm_s = firsts[row.name].cold, firsts[row.name].warm
        if row.status != "ok" or not timed:
            continue
        own = [times[row.name] for times in timed]
        lower, _, upper = quartiles([seconds for times in own for seconds in times.device])
        row.lower_ms, row.upper_ms = 1e3 * lower, 1e3 * upper
        row.median_ms = 1e3 * geometric_mean(median(times.device) for times in own)
        row.host_us = 1e6 * geometric_mean(median(times.host) for times in own)
        row.gbps = result.bytes_per_parameter * result.case["elements"] / (1e6 * row.median_ms)
        row.ratio = _ratio(timed, BASELINE, row.name, lambda times: times.device)
        if result.host_hidden:
            row.host_ratio = _ratio(timed, BASELINE, row.name, lambda times: times.host)
        row.share_of_limit = _ratio(timed, LIMIT, row.name, lambda times: times.device)


def _ratio(
    timed: Sequence[dict[str, Times]], other: str, own: str, of: Callable[[Times], Sequence[float]]
) -> float | None:
    """How many times the time of ``own`` that of ``other`` is, over rounds that both were in."""
    both = [(of(times[other]), of(times[own])) for times in timed if {other, own} <= times.keys()]
    medians = [median(a / b for a, b in zip(*pair, strict=True)) for pair in both]
    return geometric_mean(medians) if medians else None
