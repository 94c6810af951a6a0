"""The optimizers that are measured, each as torch has it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

MAX_NORM = 1.0
OPTIMIZERS: dict[str, partial[Any]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "SGD": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-3),
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-3),
    "NAdam": partial(torch.optim.NAdam, lr=1e-3),
    "RAdam": partial(torch.optim.RAdam, lr=1e-3),
    "Adamax": partial(torch.optim.Adamax, lr=1e-3),
}


def has(optimizer: str, option: str) -> bool:
    """Whether the class takes ``option``, such as ``fused``."""
    return option in inspect.signature(OPTIMIZERS[optimizer]).parameters
