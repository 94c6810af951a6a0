"""``python docs/memory_traffic.py``: the picture in README of the bytes that a step moves.

Counted, for AdamW in float32, per parameter: the norm, the clip and the update.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

# What is moved, in bytes per parameter, in the order of a step.
STEPS: dict[str, list[tuple[str, int, str]]] = {
    "clip_grad_norm_ +\nAdamW(fused=True)": [
        ("norm: read grad", 4, "#d9a441"),
        ("clip: read grad", 4, "#c8553d"),
        ("write grad", 4, "#c8553d"),
        ("update: read grad, parameter, 2 states", 16, "#4a6fa5"),
        ("write parameter, 2 states", 12, "#6b8fbf"),
    ],
    "compileclip": [
        ("norm: read grad", 4, "#d9a441"),
        ("update: read grad, parameter, 2 states", 16, "#4a6fa5"),
        ("write parameter, 2 states", 12, "#6b8fbf"),
    ],
}
ROOM = 6  # bytes whose width is enough for a text within


def main() -> None:
    """Draw ``memory_traffic.svg`` beside this file."""
    mpl.rcParams.update({"svg.hashsalt": "compileclip", "font.size": 9, "svg.fonttype": "path"})
    figure, axes = plt.subplots(figsize=(8.6, 2.5), layout="constrained")
    for row, parts in enumerate(STEPS.values()):
        left = 0
        for label, size, colour in parts:
            axes.barh(row, size, left=left, color=colour, edgecolor="white", height=0.62)
            wide = size > ROOM
            text = label.replace(": ", ":\n").replace(*((", 2", ",\n2") if wide else (" ", "\n")))
            place = {"ha": "center", "va": "center", "fontsize": 8 if wide else 7}
            axes.text(left + size / 2, row, text, color="white", **place)
            left += size
        axes.text(left + 0.4, row, f"{left} bytes", ha="left", va="center", fontweight="bold")
    axes.set_yticks(range(len(STEPS)), list(STEPS))
    axes.invert_yaxis()
    axes.set_xlim(0, 45)
    axes.set_xlabel("bytes through memory per parameter, AdamW, float32")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
