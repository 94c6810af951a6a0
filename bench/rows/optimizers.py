"""The optimizers that are measured, each as torch has it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MAX_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """A class of optimizer and its hyperparameters."""

    cls: Any
    options: tuple[tuple[str, float], ...]

    def make(self, params: Iterable[Tensor], **implementation: bool) -> Optimizer:
        """Make the optimizer; ``implementation`` is among ``foreach=``, ``fused=`` ..."""
        made: Optimizer = self.cls(params, **dict(self.options), **implementation)
        return made

    def has(self, option: str) -> bool:
        """Whether the class takes ``option``, such as ``fused``."""
        return option in inspect.signature(self.cls).parameters


def _recipe(cls: Any, **options: float) -> Recipe:
    return Recipe(cls, tuple(options.items()))


OPTIMIZERS = {
    "AdamW": _recipe(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "Adam": _recipe(torch.optim.Adam, lr=1e-3),
    "SGD": _recipe(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "Adagrad": _recipe(torch.optim.Adagrad, lr=1e-3),
    "RMSprop": _recipe(torch.optim.RMSprop, lr=1e-3),
    "NAdam": _recipe(torch.optim.NAdam, lr=1e-3),
    "RAdam": _recipe(torch.optim.RAdam, lr=1e-3),
    "Adamax": _recipe(torch.optim.Adamax, lr=1e-3),
}
