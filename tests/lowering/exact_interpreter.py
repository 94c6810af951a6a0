"""Triton's interpreter, made to round as a GPU does.

It has a product and a sum where a GPU has a fused multiply-add, rounds to bfloat16 otherwise, and
loses small ones. It stands in for private parts of triton, read in triton 3.7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from exact_fma import fma
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def make_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until ``monkeypatch`` takes it back."""
    original = InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            data = np.ascontiguousarray(source.data)
            rounded = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16).reshape(source.data.shape), dtype.scalar)
        if source.dtype.scalar == tl.bfloat16 and dtype.scalar == tl.float32:
            bits = source.data.astype(np.uint32) << 16
            return TensorHandle(bits.view(np.float32), dtype.scalar)
        return original(self, source, dtype)

    def contracted(self: Any, x: Any, y: Any, z: Any) -> Any:
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_fma", contracted)
    for name in ("create_fp_trunc", "create_fp_ext"):
        monkeypatch.setattr(InterpreterBuilder, name, cast)
