"""Lists of plain tensors on a CPU, as native kernels take them: by addresses and sizes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from compileclip.lowering import is_disabled

# What kernels call the dtypes.
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PLAIN = {Tensor, Parameter}
_is_cpu = attrgetter("is_cpu")
is_dense = torch.ops.aten.is_non_overlapping_and_dense.default


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether ``tensors`` are plain ones on a CPU, and native code may replace torch's."""
    return (
        PLAIN.issuperset(map(type, tensors))
        and all(map(_is_cpu, tensors))
        and runs_for_real()
        and not is_disabled()
    )


def runs_for_real() -> bool:
    """Whether an operation on plain tensors computes: nothing traces, nothing intercepts it."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


def addresses(tensors: Sequence[Tensor]) -> tuple[array[int], array[int]] | None:
    """The addresses (``"Q"``) and numbers of elements (``"q"``) of dense tensors.

    Returns:
        None where one of them has no memory.
    """
    pointers = array("Q", list(map(Tensor.data_ptr, tensors)))
    sizes = array("q", list(map(Tensor.numel, tensors)))
    if 0 in pointers and any(n and not p for n, p in zip(sizes, pointers, strict=True)):
        return None
    return pointers, sizes
