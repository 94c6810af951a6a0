"""Lists of parameter shapes: of models that many know, of extremes, and of a user's own model."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


class ModelError(ValueError):
    """A user's model function gave no parameters; the message says why."""


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


def vit_b() -> list[Shape]:
    """ViT-B/16 for 1,000 classes and images of 224 x 224."""
    w = 768
    block: list[Shape] = [
        *[(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,)],
        *[(w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)],
    ]
    ends: list[Shape] = [(w,), (w,), (1000, w), (1000,)]
    return [(1, 1, w), (1, 197, w), (w, 3, 16, 16), (w,), *block * 12, *ends]


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
    "gpt2-xl": lambda: gpt2(48, 1600),
    "llama-1b": llama_1b,
    "vit-b": vit_b,
    "resnet50": resnet50,
    "2000x32x32": lambda: [(32, 32)] * 2000,
    "64x1024x1024": lambda: [(1024, 1024)] * 64,
    "1x1000": lambda: [(1000,)],
}
LABELS = {
    "gpt2": "GPT-2 small",
    "gpt2-xl": "GPT-2 XL",
    "llama-1b": "Llama 1B",
    "vit-b": "ViT-B",
    "resnet50": "ResNet-50",
    "2000x32x32": "2,000 of 32 x 32",
    "64x1024x1024": "64 of 1024 x 1024",
    "1x1000": "1 of 1,000",
}


def label(name: str) -> str:
    """What tables call the list of shapes."""
    return LABELS.get(name, name)


def of_model(spec: str) -> list[Shape]:
    """The shapes of a user's model.

    Args:
        spec: ``module:function``. The function takes nothing and returns a module, or parameters.

    Raises:
        ModelError: it cannot be found, it fails, or what it returns has no parameters.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise ModelError(f"{spec!r} is not module:function, as in my_package.models:make_model")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), name)()
    # It is a user's code, which may raise anything, SystemExit included.
    except (Exception, SystemExit) as error:
        raise ModelError(f"{spec} failed: {type(error).__name__}: {error}") from error
    return _shapes(spec, made)


def _shapes(spec: str, made: Any) -> list[Shape]:
    params = made.parameters() if isinstance(made, nn.Module) else made
    if not isinstance(params, Iterable) or isinstance(params, (str, Tensor)):
        raise ModelError(f"{spec} returned {type(made).__name__}, no module and no parameters")
    params = list(params)
    if not all(isinstance(p, Tensor) for p in params):
        raise ModelError(f"{spec} returned a list of which not all are tensors")
    shapes = [tuple(p.shape) for p in params if p.requires_grad]
    if not sum(math.prod(shape) for shape in shapes):
        raise ModelError(f"{spec} returned no parameter that requires a gradient")
    return shapes
