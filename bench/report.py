"""The demo's table and figure."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from bench.gpt import GPT, GPTConfig
from bench.training import Result
from bench.updates import REFERENCE, Recipe

FIRST_STEPS = 5  # they compile, and fill caches, so that they do not count in a median
LAST_STEPS = 10  # the final loss is their mean

# By seed, then by row.
Results = Sequence[Sequence[Result]]


def describe(config: GPTConfig, recipe: Recipe, device: torch.device) -> str:
    """One line on what was trained, and where."""
    params = list(GPT(config).parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{device} ({name}, {torch.get_num_threads()} threads), torch {torch.__version__}, "
        f"Python {platform.python_version()}; "
        f"GPT with {sum(p.numel() for p in params):,} parameters in {len(params)} tensors; "
        f"AdamW, {recipe.steps} steps of {recipe.batch} x {config.block} bytes, "
        f"max_norm {recipe.max_norm:g}"
    )


def table(results: Results, max_norm: float) -> str:
    """A row per way to clip and step, aggregated over the seeds."""
    headers = [
        "",
        f"final loss\n(last {LAST_STEPS} steps)",
        f'largest difference\nfrom "{REFERENCE}": loss',
        "\nparameters",
        "steps\nclipped",
        "ms per step\n(median)",
        "ms per clip and\nstep (median)",
        f"s in clip and step,\nfirst {FIRST_STEPS} steps",
    ]
    rows = [_row([by_name[name] for by_name in _by_name(results)], results, max_norm)
            for name in _names(results)]
    return tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 7))
