"""From the times of a case's rows, process by process, to its results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import median

from bench.measuring.timing import Times, summarize
from bench.reporting.results import CaseResult, RowResult
from bench.rows.registry import BASELINE, LIMIT

Part = dict[str, Times]  # what one process took: of each row, in the same rounds
ENOUGH = 5  # rounds for a median


def conclude(result: CaseResult, parts: Sequence[Part]) -> None:
    """Fill in what times tell: the rounds in which cores lay near count, where there are enough."""
    near, apart = (_choose(parts, choice) for choice in (lambda t: t.near, lambda t: t.apart))
    counted = near if _rounds(near) >= ENOUGH else parts
    latencies = [x for part in counted for x in next(iter(part.values())).core_latency]
    result.rounds, result.processes = len(latencies), len(counted)
    result.core_latency_ns = median(latencies or [0.0])
    needed = result.bytes_per_parameter * result.case["elements"]
    for row in result.rows:
        own = [part[row.name] for part in counted if row.name in part]
        if not own:
            continue
        _store(row, own)
        row.gbps = needed / (row.median_ms * 1e6) if row.median_ms else None
        row.ratio = _ratio(counted, BASELINE, row.name)
        if result.host_hidden:
            row.host_ratio = _ratio(counted, BASELINE, row.name, lambda times: times.host)
        row.share_of_limit = _ratio(counted, LIMIT, row.name)
        if row.share_of_limit is not None:
            row.bytes_per_parameter = result.bytes_per_parameter / row.share_of_limit
        if _rounds(apart) >= ENOUGH:
            row.ratio_apart = _ratio(apart, BASELINE, row.name)


def center(parts: Sequence[Sequence[float]]) -> float:
    """The geometric mean of the processes' medians, each weighted by its number of rounds.

    In some processes a row is slower throughout, and where these are half of all, a median over
    all rounds would be that of the one kind or of the other.
    """
    logs = [len(part) * math.log(median(part)) for part in parts]
    return math.exp(math.fsum(logs) / sum(map(len, parts)))


def _choose(parts: Sequence[Part], rounds: Callable[[Times], Sequence[int]]) -> list[Part]:
    chosen = [{name: t.take(rounds(t)) for name, t in part.items()} for part in parts]
    return [part for part in chosen if any(t.device for t in part.values())]


def _rounds(parts: Sequence[Part]) -> int:
    return sum(len(next(iter(part.values())).device) for part in parts)


def _store(row: RowResult, own: Sequence[Times]) -> None:
    spread = summarize(list(itertools.chain.from_iterable(times.device for times in own)))
    row.lower_ms, row.upper_ms = 1e3 * spread.lower, 1e3 * spread.upper
    row.median_ms = 1e3 * center([times.device for times in own])
    row.host_us = 1e6 * center([times.host for times in own])


def _ratio(
    parts: Sequence[Part],
    other: str,
    own: str,
    of: Callable[[Times], Sequence[float]] = lambda times: times.device,
) -> float | None:
    """How many times the time of ``own`` that of ``other`` is, over rounds that both were in."""
    both = [(of(part[other]), of(part[own])) for part in parts if {other, own} <= part.keys()]
    ratios = [[a / b for a, b in zip(*pair, strict=True)] for pair in both]
    return center(ratios) if ratios else None
