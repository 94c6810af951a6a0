"""The demo's figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measuring.training import Result
from bench.reporting.results import CaseResult
from bench.rows.training_rows import TRAINING_ROWS

# Dashes in turn: where lines coincide, each of them is seen.
DASH = 4
STYLES: dict[str, dict[str, Any]] = {
    name: {
        "color": f"C{i}",
        "linestyle": (-DASH * i, (DASH, DASH * (len(TRAINING_ROWS) - 1))),
        "linewidth": 2,
    }
    for i, name in enumerate(TRAINING_ROWS)
}


def figure(case: CaseResult, results: Sequence[Result], max_norm: float, out: Path) -> None:
    """Write a PNG: losses, norms and times."""
    from matplotlib.figure import Figure  # a GPU machine may have none, and needs none otherwise

    fig = Figure(figsize=(15, 4.5), layout="constrained")
    fig.suptitle(case.title, fontsize=10)
    losses, norms, times = fig.subplots(1, 3)
    for r in results:
        label = r.name if r.seed == results[0].seed else None
        steps = range(1, len(r.losses) + 1)
        losses.plot(steps, r.losses, label=label, **STYLES[r.name])
        norms.plot(steps, r.norms, **STYLES[r.name])
    losses.set(title="Training loss (nats per byte)", xlabel="step")
    for line in losses.legend(frameon=False).get_lines():
        line.set_linestyle("-")  # the sample is too short for dashes
    norms.axhline(max_norm, color="black", linewidth=1, label=f"max_norm = {max_norm:g}")
    norms.set(title="Total norm of the gradients before clipping", xlabel="step", yscale="log")
    norms.legend(frameon=False)
    rows = [row for row in case.rows if row.median_ms is not None]
    names = [row.name for row in rows]
    times.barh(names, [r.median_ms or 0.0 for r in rows], color="#c6dbef")
    part = [row.update_ms or 0.0 for row in rows]
    times.barh(names, part, height=0.4, color="#cb181d")
    times.invert_yaxis()
    times.set(title="Training step (pale), and its clip and step", xlabel="median ms")
    fig.savefig(out, format="png", dpi=120)
