"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tabulate import tabulate

from bench.reporting.results import CaseResult, RowResult
from bench.rows.registry import BASELINE

NONE = "-"
Columns = Sequence[tuple[str, Callable[[RowResult], str]]]


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
COLUMNS: Columns = [
    ("clip and step by", lambda r: r.name),
    ("ms,\nmedian", lambda r: milliseconds(r.median_ms)),
    ("IQR,\nms", lambda r: milliseconds(spread(r))),
    ("times\nas fast", lambda r: ratio(r.ratio)),
    ("host,\nµs", lambda r: microseconds(r.host_us)),
    ("host, times\nas fast", lambda r: ratio(r.host_ratio)),
    ("GB/s", lambda r: _format("{:.1f}")(r.gbps)),
    ("of the\nlimit", lambda r: percent(r.share_of_limit)),
    ("kernels", lambda r: _format("{:,}")(r.kernels)),
    ("first step,\ns, cold", lambda r: seconds(r.first_cold_s)),
    ("first step,\ns, warm", lambda r: seconds(r.first_warm_s)),
    ("extra\nMiB", lambda r: _format("{:,.1f}", 2**-20)(r.extra_bytes)),
    ("from\nfloat64", lambda r: _format("{:.1e}")(r.difference)),
]
TRAIN_COLUMNS: Columns = [
    COLUMNS[0],
    ("training\nstep, ms", lambda r: milliseconds(r.median_ms)),
    *COLUMNS[2:4],
    ("clip and\nstep, ms", lambda r: milliseconds(r.update_ms)),
    ("part of\nthe step", lambda r: percent(share_of_training(r))),
]
DEMO_COLUMNS: Columns = [
    *TRAIN_COLUMNS,
    ("first 5\nsteps, s", lambda r: seconds(r.first_cold_s)),
    ("final\nloss", lambda r: _format("{:.4f}")(r.final_loss)),
    ("loss\ndifference", lambda r: _format("{:.1e}")(r.difference)),
    ("parameter\ndifference", lambda r: _format("{:.1e}")(r.param_difference)),
    ("steps\nclipped", lambda r: percent(r.clipped)),
]
NOTES = f"""\
ms: until the device is done; the median, and of several processes the geometric mean of theirs.
Times as fast: as "{BASELINE}", likewise, over rounds in which each row took one step. GB/s: the
bytes needed by the time. Host: until the next call may run; on a GPU ms are the GPU's alone, and
the host's are of a call after other work. First step: rows that compile in a fresh process, with
empty caches on disk and with filled ones. Extra: the most memory that a step allocates. From
float64: the largest difference of a parameter, after two steps."""
TRAIN_NOTES = """\
Times: medians without the first 5 steps, in which rows are compiled; a training step in one graph
has none for clip and step alone. Times as fast: the whole training step, as torch's clip_grad_norm_
and fused AdamW. Differences: the largest from the row "torch", of any step's loss and of any
parameter at the end. Final loss: the mean of the last 10 steps."""


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


def table(lines: Sequence[Sequence[str]], headers: Sequence[str], tablefmt: str = "simple") -> str:
    """The first column on the left, numbers on the right."""
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers, tablefmt=tablefmt, disable_numparse=True, colalign=align)


def rows_table(case: CaseResult, columns: Columns, tablefmt: str = "simple") -> str:
    """The case's rows with times, without columns that say nothing here."""
    measured = [row for row in case.rows if row.median_ms is not None]
    shown = [(h, of) for h, of in columns if any(of(row) != NONE for row in measured)]
    headers = [header.replace("\n", "\n" if tablefmt == "simple" else " ") for header, _ in shown]
    return table([[value(row) for _, value in shown] for row in measured], headers, tablefmt)


def case_table(case: CaseResult, columns: Columns = COLUMNS) -> str:
    """The case's rows with times as a table, and a line for each other row."""
    needed = f"; {case.bytes_per_parameter:.0f} bytes needed; {case.rounds} rounds"
    parts = [f"\n{case.title}{needed if case.rounds else ''}"]
    if case.reason:
        parts.append(f"not run: {case.reason}")
    if any(row.median_ms is not None for row in case.rows):
        parts.append(rows_table(case, columns))
    parts += [_status(row) for row in case.rows if row.median_ms is None]
    return "\n".join(parts)


def _status(row: RowResult) -> str:
    """Why a row has no times."""
    said = row.reason.startswith((row.status, "not served"))
    return f"{row.name}: {row.reason if said else f'{row.status}: {row.reason}'}"
