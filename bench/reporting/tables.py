"""Results as tables for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from tabulate import tabulate

from bench.measuring.cores import APART
from bench.reporting.results import CaseResult, RowResult
from bench.rows.registry import BASELINE, LIMIT

NONE = "-"


def _format(pattern: str, factor: float = 1.0) -> Callable[[float | None], str]:
    return lambda value: NONE if value is None else pattern.format(factor * value)


def milliseconds(value: float | None) -> str:
    """Three digits, as many as the spread leaves meaning in."""
    if value is None:
        return NONE
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


microseconds = _format("{:,.0f}")
seconds = _format("{:.2f}")
ratio = _format("{:.2f}")
percent = _format("{:.0f}%", 100)
COLUMNS: list[tuple[str, Callable[[RowResult], str]]] = [
    ("clip and step by", lambda r: r.name),
    ("ms,\nmedian", lambda r: milliseconds(r.median_ms)),
    ("IQR,\nms", lambda r: milliseconds(spread(r))),
    ("times\nas fast", lambda r: ratio(r.ratio)),
    ("cores\napart", lambda r: ratio(r.ratio_apart)),
    ("bytes per\nparameter", lambda r: _format("{:.0f}")(r.bytes_per_parameter)),
    ("GB/s", lambda r: _format("{:.1f}")(r.gbps)),
    ("of the\nlimit", lambda r: percent(r.share_of_limit)),
    ("kernels", lambda r: NONE if r.kernels is None else f"{r.kernels:,}"),
    ("host,\nµs", lambda r: microseconds(r.host_us)),
    ("first step,\ns, cold", lambda r: seconds(r.first_cold_s)),
    ("first step,\ns, warm", lambda r: seconds(r.first_warm_s)),
    ("extra\nMiB", lambda r: _format("{:,.1f}", 2**-20)(r.extra_bytes)),
    ("from\nfloat64", lambda r: _format("{:.1e}")(r.difference)),
]
# Where the host is timed by itself; the cores of the host are not looked at there.
GPU_COLUMNS: list[tuple[str, Callable[[RowResult], str]]] = [
    *COLUMNS[:1],
    ("GPU ms,\nmedian", COLUMNS[1][1]),
    *COLUMNS[2:4],
    ("host,\nµs", lambda r: microseconds(r.host_us)),
    ("host, times\nas fast", lambda r: ratio(r.host_ratio)),
    *(column for column in COLUMNS[5:] if column[0] != "host,\nµs"),
]
TRAIN_COLUMNS: list[tuple[str, Callable[[RowResult], str]]] = [
    *COLUMNS[:1],
    ("training\nstep, ms", lambda r: milliseconds(r.median_ms)),
    *COLUMNS[2:4],
    ("clip and\nstep, ms", lambda r: milliseconds(r.update_ms)),
    ("of the\nstep", lambda r: percent(share_of_training(r))),
    ("first 5\nsteps, s", lambda r: seconds(r.first_cold_s)),
    ("loss\ndifference", lambda r: _format("{:.1e}")(r.difference)),
]
NOTES = f"""\
ms: until the device is done; the median, and of several processes the geometric mean of theirs.
Times as fast: as "{BASELINE}", likewise, over rounds in which each row took one step. Cores apart:
the same over rounds in which two threads took {APART:.0f} ns and more to see each other's stores,
which count for nothing else where there are others. Bytes per parameter: what the limit moves in
the same time, beside what a step needs. GB/s: the bytes needed by the time. Host: until the next
call may run; where GPU ms are beside it, these are the GPU's alone, and the host's of a call after
other work. First step: rows that compile in a fresh process, with empty caches on disk and with
filled ones. Extra: the most memory that a step allocates. From float64: the largest difference of a
parameter, after two steps."""
TRAIN_NOTES = (
    "Times as fast: the whole training step, as torch's clip_grad_norm_ and fused AdamW. Loss "
    "difference:\nthe largest of any step from torch's plain AdamW."
)


def spread(row: RowResult) -> float | None:
    """The interquartile range."""
    if row.upper_ms is None or row.lower_ms is None:
        return None
    return row.upper_ms - row.lower_ms


def share_of_training(row: RowResult) -> float | None:
    """What part of a training step clip and step are."""
    if row.update_ms is None or row.median_ms is None:
        return None
    return row.update_ms / row.median_ms


def case_table(
    case: CaseResult,
    columns: Sequence[tuple[str, Callable[[RowResult], str]]] | None = None,
    headline: bool = True,
) -> str:
    """The case's rows with times as a table, and a line for each other row."""
    columns = columns or (GPU_COLUMNS if case.host_hidden else COLUMNS)
    measured = [row for row in case.rows if row.median_ms is not None]
    parts = [f"\n{case.title}{_rounds(case)}"] if headline else []
    if case.reason:
        parts.append(f"not run: {case.reason}")
    if measured:
        cells = [[value(row) for _, value in columns] for row in measured]
        headers = [header for header, _ in columns]
        align = ["left", *["right"] * (len(headers) - 1)]
        parts.append(tabulate(cells, headers, disable_numparse=True, colalign=align))
    parts += [status_line(row) for row in case.rows if row.median_ms is None]
    return "\n".join(parts)


def _rounds(case: CaseResult) -> str:
    if not case.rounds:
        return ""
    latency = f", cores {case.core_latency_ns:.0f} ns apart" if case.core_latency_ns else ""
    return f"; {case.bytes_per_parameter:.0f} bytes needed; {case.rounds} rounds{latency}"


def status_line(row: RowResult) -> str:
    """Why a row has no times."""
    said = row.reason.startswith((row.status, "not served"))
    return f"{row.name}: {row.reason if said else f'{row.status}: {row.reason}'}"


def summary(cases: Sequence[CaseResult]) -> str:
    """A line per case: the baseline, compileclip's best row and the best of all others."""
    lines = []
    for case in cases:
        measured = [r for r in case.rows if r.median_ms is not None and r.name != LIMIT]
        ours = [row for row in measured if row.name.startswith("compileclip")]
        others = [row for row in measured if row not in ours]
        cells = [_best(others), _best(ours)]
        if measured:
            lines.append([case.title.partition(" (")[0], *_work(case), *itertools.chain(*cells)])
    headers = ["case", "optimizer", "dtype", "fastest of others", "ms", "times\nas fast"]
    headers += ["fastest of compileclip", "ms", "times\nas fast"]
    align = ["left"] * 4 + ["right"] * 2 + ["left"] + ["right"] * 2
    return tabulate(lines, headers, disable_numparse=True, colalign=align) if lines else ""


def _best(rows: Sequence[RowResult]) -> tuple[str, str, str]:
    if not rows:
        return NONE, NONE, NONE
    best = min(rows, key=lambda row: row.median_ms or 0.0)
    return best.name.removeprefix("compileclip, "), milliseconds(best.median_ms), ratio(best.ratio)


def _work(case: CaseResult) -> tuple[str, str]:
    return case.case["optimizer"], case.case["dtypes"]
