"""Lists of parameter shapes: of models that many know, of extremes, and of a user's own model."""

from __future__ import annotations

import argparse
import math
import pkgutil
from collections.abc import Callable

from torch import nn

Shape = tuple[int, ...]


def gpt2(layers: int, width: int) -> list[Shape]:
    """GPT-2, whose head is tied to the token embedding."""
    w = width
    block: list[Shape] = [
        *[(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)],  # norm, then attention
        *[(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)],  # norm, then MLP
    ]
    return [(50257, w), (1024, w), *block * layers, (w,), (w,)]


def llama_1b() -> list[Shape]:
    """Llama 3.2 1B: grouped queries, gated MLP, no biases, tied head."""
    w, keys, hidden = 2048, 512, 8192
    attention: list[Shape] = [(w, w), (keys, w), (keys, w), (w, w)]
    block: list[Shape] = [*attention, (hidden, w), (hidden, w), (w, hidden), (w,), (w,)]
    return [(128256, w), *block * 16, (w,)]


def resnet50() -> list[Shape]:
    """ResNet-50 for 1,000 classes: each convolution with the two vectors of its batch norm."""
    shapes = _convolution(3, 64, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        out = 4 * width
        for block in range(blocks):
            shapes += _convolution(into, width, 1) + _convolution(width, width, 3)
            shapes += _convolution(width, out, 1)
            if block == 0:
                shapes += _convolution(into, out, 1)  # where the sizes of a block's ends differ
            into = out
    return [*shapes, (1000, into), (1000,)]


def _convolution(into: int, out: int, kernel: int) -> list[Shape]:
    return [(out, into, kernel, kernel), (out,), (out,)]


# By the name that the command line takes.
SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "gpt2": lambda: gpt2(12, 768),
    "llama-1b": llama_1b,
    "resnet50": resnet50,
    "2000x32x32": lambda: [(32, 32)] * 2000,
    "64x1024x1024": lambda: [(1024, 1024)] * 64,
    "1x1000": lambda: [(1000,)],
}
LABELS = {
    "gpt2": "GPT-2 small",
    "llama-1b": "Llama 1B",
    "resnet50": "ResNet-50",
    "2000x32x32": "2,000 of 32 x 32",
    "64x1024x1024": "64 of 1024 x 1024",
    "1x1000": "1 of 1,000",
}


def label(name: str) -> str:
    """What tables call the list of shapes."""
    return LABELS.get(name, name)


def of_model(spec: str) -> tuple[str, list[Shape]]:
    """``spec`` and the shapes of a user's model.

    Args:
        spec: ``module:function``. The function takes nothing and returns a module, or parameters.

    Raises:
        ArgumentTypeError: it cannot be found, it fails, or what it returns has no parameters.
    """
    try:
        made = pkgutil.resolve_name(spec)()
        params = list(made.parameters() if isinstance(made, nn.Module) else made)
        shapes = [tuple(p.shape) for p in params if p.requires_grad]
    # It is a user's code, which may raise anything, SystemExit included.
    except (Exception, SystemExit) as error:
        what = f"{spec} failed: {type(error).__name__}: {error}"
        raise argparse.ArgumentTypeError(what) from error
    if not sum(map(math.prod, shapes)):
        raise argparse.ArgumentTypeError(f"{spec} returned no parameter that requires a gradient")
    return spec, shapes
