"""The orders of norms that tests go through, and the norm that is true."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ORDERS = [0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 3.5, 4.0, math.inf, -0.1, -1.0, -2.0, -3.5, -math.inf]
FOREACH = [None, True, False]


def grads_of(params: list[Any]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def true_norm(tensors: list[Tensor], p: float) -> float:
    wide = [t.abs().double().reshape(-1) for t in tensors]
    return float(torch.linalg.vector_norm(torch.cat(wide), p))
