"""Results as figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases.shapes import label
from bench.measuring.environment import headline
from bench.reporting.results import CaseResult, Report, RowResult
from bench.reporting.tables import milliseconds
from bench.rows.registry import LIMIT, NAMES, ROWS

DPI = 120
# Torch's rows blue, torch.compile's green, compileclip's in warm colors.
COLORS = (
    *("#9ecae1", "#4292c6", "#084594", "#17becf", "#7a5fb5"),
    *("#a1d99b", "#238b45"),
    *("#fdae6b", "#f16913", "#cb181d", "#67000d"),
    *("#7f7f7f", "#000000"),
)
MARKERS = "osDp^vP<>Xh*."
STYLES: dict[str, dict[str, Any]] = {
    name: {"color": color, "marker": marker, "linestyle": "--" if name == LIMIT else "-"}
    for name, color, marker in zip(NAMES, COLORS, MARKERS, strict=True)
}
COMPILING = {row.name for row in ROWS if row.compiles}
Value = Callable[[RowResult], float | None]


def of_step(report: Report, path: Path) -> list[Path]:
    """Draw each row's time and share of the limit, and first steps; beside the JSON file."""
    drawn = []
    for (optimizer, dtypes, device), cases in _groups(report.cases).items():
        name = path.stem
        if len(_groups(report.cases)) > 1:
            name += f"-{optimizer}-{dtypes}-{device}".lower().replace(":", "")
        what = f"{optimizer}, {dtypes.replace('+', ' with state in ')}, {device}"
        out = path.with_name(f"{name}-limit.png")
        _bars(cases, f"Clip and step: share of the limit ({what})", report, out)
        drawn.append(out)
        if any(_compilation(row) for case in cases for row in case.rows):
            out = path.with_name(f"{name}-first-step.png")
            _first_bars(cases, f"Clip and step: the first step ({what})", report, out)
            drawn.append(out)
    return drawn


def of_scaling(report: Report, path: Path) -> list[Path]:
    """Draw time, share of the limit and first steps against tensors and sizes."""
    tensors = [case for case in report.cases if case.case["shapes"].endswith("tensors")]
    sizes = [case for case in report.cases if case.case["shapes"].endswith("elements")]
    sweeps = [
        ("tensors", "tensors of 32 x 32", tensors),
        ("elements", "elements, in 16 tensors", sizes),
    ]
    sweeps = [sweep for sweep in sweeps if any(case.rows for case in sweep[2])]
    figures: list[tuple[str, str, Value, str]] = [
        ("time", "time per step (ms)", lambda row: row.median_ms, "Clip and step: time"),
        ("limit", "share of the limit (%)", _percent, "Clip and step: share of the limit"),
        ("first-step", "first step (s)", _compilation, "The first step, with empty caches"),
    ]
    drawn = []
    for name, ylabel, value, title in figures:
        out = path.with_name(f"{path.stem}-{name}.png")
        shown = [s for s in sweeps if any(value(r) for c in s[2] for r in c.rows)]
        if shown:
            _lines(shown, ylabel, value, f"{title} ({_work(report)})", report, out)
            drawn.append(out)
    return drawn


def of_train(report: Report, path: Path) -> list[Path]:
    """Draw the training step of each row, with clip and step as a part of it."""
    (case,) = report.cases
    rows = [row for row in case.rows if row.median_ms is not None]
    fig, axes = _figure(1, 1.6 + 0.42 * len(rows), "A whole training step", report)
    whole = [row.median_ms or 0.0 for row in rows]
    part = [row.update_ms or 0.0 for row in rows]
    names = [row.name for row in rows]
    axes[0].grid(visible=False, axis="y")
    bars = axes[0].barh(names, whole, color="#c6dbef", label="training step")
    axes[0].bar_label(bars, [f"{milliseconds(value)} ms" for value in whole], padding=4)
    axes[0].barh(names, part, color="#cb181d", height=0.4, label="of it clip and step")
    axes[0].invert_yaxis()
    axes[0].set(title=case.title, xlabel="median time (ms)")
    axes[0].margins(x=0.15)
    fig.legend(loc="outside lower center", ncols=2, frameon=False)
    out = path.with_name(f"{path.stem}.png")
    fig.savefig(out, dpi=DPI)
    return [out]


def _percent(row: RowResult) -> float | None:
    return None if row.share_of_limit is None else 100 * row.share_of_limit


def _compilation(row: RowResult) -> float | None:
    return row.first_cold_s if row.name in COMPILING else None


def _work(report: Report) -> str:
    case = report.cases[0].case
    return f"{case['optimizer']}, {case['dtypes'].replace('+', ' with state in ')}"


def _groups(cases: Sequence[CaseResult]) -> dict[tuple[str, str, str], list[CaseResult]]:
    groups: dict[tuple[str, str, str], list[CaseResult]] = {}
    for case in cases:
        if any(row.median_ms is not None for row in case.rows):
            key = (case.case["optimizer"], case.case["dtypes"], case.case["device"])
            groups.setdefault(key, []).append(case)
    return groups


def _figure(
    panels: int, panel_height: float, title: str, report: Report
) -> tuple[Figure, list[Axes]]:
    columns = min(2, panels)
    lines = math.ceil(panels / columns)
    fig = Figure(figsize=(7.0 * max(columns, 1.5), panel_height * lines + 1.2))
    fig.set_layout_engine("constrained", hspace=0.05, wspace=0.05)
    fig.suptitle(f"{title}\n{headline(report.environment)}", fontsize=10)
    axes = list(fig.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    for used in axes[:panels]:
        used.grid(alpha=0.3)
        used.set_axisbelow(True)
        used.spines[["top", "right"]].set_visible(False)
    return fig, axes[:panels]


def _bars(cases: Sequence[CaseResult], title: str, report: Report, out: Path) -> None:
    height = 1.2 + 0.26 * max(len(_measured(case)) for case in cases)
    fig, panels = _figure(len(cases), height, title, report)
    for axes, case in zip(panels, cases, strict=True):
        rows = _measured(case)
        shares = [_percent(row) or 0.0 for row in rows]
        colors = [STYLES[row.name]["color"] for row in rows]
        axes.grid(visible=False, axis="y")
        bars = axes.barh([row.name for row in rows], shares, color=colors, height=0.7)
        texts = [
            f"{s:.0f} %: {milliseconds(r.median_ms)} ms" for s, r in zip(shares, rows, strict=True)
        ]
        axes.bar_label(bars, texts, padding=4, fontsize=8)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=8)
        axes.set(title=label(case.case["shapes"]), xlabel="share of the limit (%)")
        axes.set_xlim(0, 1.3 * max([100.0, *shares]))
    fig.savefig(out, dpi=DPI)


def _first_bars(cases: Sequence[CaseResult], title: str, report: Report, out: Path) -> None:
    shown = [case for case in cases if any(_compilation(row) for row in case.rows)]
    height = 1.2 + 0.36 * max(len(_measured(case)) for case in shown)
    fig, panels = _figure(len(shown), height, title, report)
    for axes, case in zip(panels, shown, strict=True):
        rows = [row for row in _measured(case) if _compilation(row)]
        for offset, attribute, alpha in ((-0.2, "first_cold_s", 1.0), (0.2, "first_warm_s", 0.5)):
            values = [getattr(row, attribute) or 0.0 for row in rows]
            places = [place + offset for place in range(len(rows))]
            colors = [STYLES[row.name]["color"] for row in rows]
            bars = axes.barh(places, values, height=0.4, color=colors, alpha=alpha)
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, fontsize=7)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.set(title=label(case.case["shapes"]))
        axes.set_xlabel("first step (s): caches on disk empty (full color), filled (pale)")
    fig.savefig(out, dpi=DPI)


def _lines(
    sweeps: Sequence[tuple[str, str, list[CaseResult]]],
    ylabel: str,
    value: Value,
    title: str,
    report: Report,
    out: Path,
) -> None:
    fig, panels = _figure(len(sweeps), 4.2, title, report)
    for axes, (key, xlabel, cases) in zip(panels, sweeps, strict=True):
        for name, points in _series(cases, key, value):
            axes.plot(*zip(*points, strict=True), label=name, markersize=5, **STYLES[name])
        axes.set(xlabel=f"number of {xlabel}", ylabel=ylabel, xscale="log")
        measured = sorted({case.case[key] for case in cases})
        axes.set_xticks(measured, [f"{count:,}" for count in measured])
        axes.minorticks_off()
        if "(ms)" not in ylabel:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    handles = {
        name: line
        for axes in panels
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    ordered = [name for name in NAMES if name in handles]
    fig.legend(
        [handles[n] for n in ordered], ordered, loc="outside lower center", ncols=4, frameon=False
    )
    fig.savefig(out, dpi=DPI)


def _series(
    cases: Sequence[CaseResult], key: str, value: Value
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for name in NAMES:
        points = [
            (float(case.case[key]), found)
            for case in cases
            for row in case.rows
            if row.name == name and (found := value(row)) is not None
        ]
        if points:
            yield name, points


def _measured(case: CaseResult) -> list[RowResult]:
    return [row for row in case.rows if row.median_ms is not None]
