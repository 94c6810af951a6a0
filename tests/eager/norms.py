"""Tensors, their exact norms, and the native kernel's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from helpers import same
from torch import Tensor

import compileclip
from compileclip.lowering.cpp import cpp_norm

ORDERS = [2.0, math.inf]


def random(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).to(dtype)


def truth(tensors: Sequence[Tensor], order: float) -> float:
    """The norm in numpy's long double, 64 bits of mantissa."""
    flat = np.concatenate([t.detach().double().numpy().reshape(-1) for t in tensors])
    wide = np.abs(flat.astype(np.longdouble))
    return float(np.max(wide, initial=0) if order == math.inf else np.sqrt(np.sum(wide * wide)))


def served(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The kernel's norm, and that callers get it."""
    result = cpp_norm.total_norm(tensors, order)
    assert result is not None
    assert same(compileclip.get_total_norm(tensors, order), result)
    return result
