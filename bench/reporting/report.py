"""The demo's table and figure."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from bench.cases.gpt import GPT, GPTConfig
from bench.measuring.training import Result
from bench.rows.updates import COMPILED, ONE_GRAPH, REFERENCE, UPDATES, Recipe

FIRST_STEPS = 5  # they compile and fill caches, so they do not count in a median
LAST_STEPS = 10  # the final loss is their mean

HEADERS = [
    "clip and step by",
    "final\nloss",
    "loss\ndifference",
    "parameter\ndifference",
    "steps\nclipped",
    "ms per train-\ning step",
    "ms per clip\nand step",
    f"first {FIRST_STEPS} train-\ning steps, s",
]
NOTES = (
    f"Final loss: mean of the last {LAST_STEPS} steps. Differences: the largest from the row "
    f'"{REFERENCE}", of any\nstep and of any parameter at the end. ms: medians without the first '
    f'{FIRST_STEPS} steps,\nin which "{COMPILED}" compiles clip and step, and "{ONE_GRAPH}" '
    "the whole training\nstep as one graph, where clip and step have no time of their own (sooner "
    "if the cache on disk\nis warm)."
)
NOTES_ON_SEEDS = (
    "\nSeveral seeds: mean ± standard deviation of the final loss; the largest difference and "
    "first steps;\nshare and medians over all their steps."
)

# Dashes in turn: where lines coincide, each of them is seen.
DASH = 4
STYLES: dict[str, dict[str, Any]] = {
    name: {
        "color": f"C{i}",
        "linestyle": (-DASH * i, (DASH, DASH * (len(UPDATES) - 1))),
        "linewidth": 2,
    }
    for i, name in enumerate(UPDATES)
}


def describe(config: GPTConfig, recipe: Recipe, device: torch.device) -> str:
    """Say in two lines where what was trained."""
    params = list(GPT(config).parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{device} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
        f"GPT with {sum(p.numel() for p in params):,} parameters in {len(params)} tensors, "
        f"AdamW, {recipe.steps} steps of {recipe.batch} x {config.block} bytes, "
        f"max_norm {recipe.max_norm:g}"
    )


def table(results: Sequence[Result], max_norm: float) -> str:
    """A row per way to clip and step, its seeds taken together."""
    rows = [_row(name, results, max_norm) for name in _names(results)]
    align = ("left", *["right"] * (len(HEADERS) - 1))
    text = tabulate(rows, HEADERS, disable_numparse=True, colalign=align)
    several = len({r.seed for r in results}) > 1
    return f"{text}\n{NOTES}{NOTES_ON_SEEDS if several else ''}"


def figure(results: Sequence[Result], max_norm: float, title: str, out: Path) -> None:
    """Write a PNG: losses, norms, how far the losses are from the reference's, and times."""
    fig = Figure(figsize=(12, 8), layout="constrained")
    fig.suptitle(title, fontsize=10)
    ((losses, norms), (differences, times)) = fig.subplots(2, 2)
    for r in results:
        label = r.name if r.seed == results[0].seed else None
        steps = range(1, len(r.losses) + 1)
        losses.plot(steps, r.losses, label=label, **STYLES[r.name])
        norms.plot(steps, r.norms, **STYLES[r.name])
        if r.name != REFERENCE:
            largest = list(accumulate(_loss_differences(r, results), max))
            differences.plot(steps, largest, color=STYLES[r.name]["color"])
    norms.axhline(max_norm, color="black", linewidth=1, label=f"max_norm = {max_norm:g}")
    norms.set_yscale("log")
    differences.set_ylim(bottom=0)
    _finish(losses, "Training loss", "loss (nats per byte)")
    _finish(norms, "Total norm of the gradients before clipping", "norm")
    _finish(differences, f'Largest difference in loss from "{REFERENCE}" so far', "difference")
    _legend(losses)
    _legend(norms)
    _plot_times(times, results)
    fig.savefig(out, format="png", dpi=120)


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set(title=title, xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    for line in axes.legend(frameon=False).get_lines():
        line.set_linestyle("-")  # the sample is too short for dashes


def _plot_times(axes: Axes, results: Sequence[Result]) -> None:
    names = _names(results)
    for row, name in enumerate(names):
        runs, color = _of(name, results), STYLES[name]["color"]
        whole = _median_ms([r.step_times for r in runs])
        bars = axes.barh(row - 0.2, whole, height=0.4, color=color, alpha=0.4)
        axes.bar_label(bars, fmt="%.1f", padding=4)
        if any(r.update_times for r in runs):
            part = _median_ms([r.update_times for r in runs])
            bars = axes.barh(row + 0.2, part, height=0.4, color=color)
            axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="Training step (pale), and its clip and step")
    axes.set(xlabel=f"median time without the first {FIRST_STEPS} steps (ms)")
    axes.spines[["top", "right"]].set_visible(False)


def _row(name: str, results: Sequence[Result], max_norm: float) -> list[str]:
    runs = _of(name, results)
    losses = [mean(r.losses[-LAST_STEPS:]) for r in runs]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    loss_difference = max(max(_loss_differences(r, results)) for r in runs)
    param_difference = max(r.param_difference for r in runs)
    has_update = any(r.update_times for r in runs)
    differences = [f"{loss_difference:.1e}", f"{param_difference:.1e}"]
    return [
        name,
        f"{mean(losses):.4f}{spread}",
        *(["-", "-"] if name == REFERENCE else differences),
        f"{mean(norm > max_norm for r in runs for norm in r.norms):.0%}",
        f"{_median_ms([r.step_times for r in runs]):.1f}",
        f"{_median_ms([r.update_times for r in runs]):.2f}" if has_update else "-",
        f"{max(sum(r.step_times[:FIRST_STEPS]) for r in runs):.2f}",
    ]


def _names(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.name for r in results))


def _of(name: str, results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.name == name]


def _loss_differences(result: Result, results: Sequence[Result]) -> list[float]:
    """How far each loss is from that of the reference run of the same seed."""
    reference = next(r for r in _of(REFERENCE, results) if r.seed == result.seed)
    return [abs(a - b) for a, b in zip(result.losses, reference.losses, strict=True)]


def _median_ms(times: Sequence[Sequence[float]]) -> float:
    return 1e3 * median(t for run in times for t in run[FIRST_STEPS:])
