"""The total norm of a list of tensors as one native kernel: p = 2 and inf, on a CPU.

Squares are summed in float64. A tensor is read in chunks of ``CHUNK`` elements, in the order of
its memory; what a chunk contributes depends on that chunk alone, a tensor's chunks are added in
their order and then the tensors in theirs. So the result depends neither on the number of threads
nor on how wide the machine's vectors are.

Thread t of T takes the chunks from ``t * total // T`` to ``(t + 1) * total // T`` and walks them
forward; a kernel that walks the same ranges backward next finds their ends still in the cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from array import array
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from compileclip.lowering import CHUNK, plain_tensors, threads
from compileclip.lowering.plain_tensors import CODES

SERVED = {2.0: CODES.keys(), math.inf: CODES.keys()}
_CPU = torch.device("cpu")
_dtype = attrgetter("dtype")


def total_norm(
    tensors: Sequence[Tensor], order: float, out: torch.dtype | None = None
) -> Tensor | None:
    """The norm of ``tensors`` seen as one vector, where the kernel serves them.

    It serves plain tensors on a CPU for p = 2 and inf. Those without gaps are read in the order of
    their memory, of others a copy in their own order.

    Args:
        tensors: at least one tensor of any kind.
        order: the order p of the norm.
        out: the dtype of the norm, float32 or float64.

    Returns:
        A 0-dim tensor, by default float32 or for float64 gradients float64; ``None`` where
        they are not served, or there is no compiler.
    """
    served = SERVED.get(order)
    dtypes = set(map(_dtype, tensors))
    if served is None or not served >= dtypes or not plain_tensors.serves(tensors):
        return None
    try:
        if not all(map(Tensor.is_contiguous, tensors)):
            tensors = [t if plain_tensors.is_dense(t) else t.contiguous() for t in tensors]
        found = plain_tensors.addresses(tensors)
    except RuntimeError:  # a sparse tensor, a wrapper of functorch's: there is no memory to read
        return None
    if found is None:
        return None
    pointers, sizes = found
    dtype = out or (torch.float64 if torch.float64 in dtypes else torch.float32)
    total = torch.empty((), dtype=dtype, device=_CPU)  # not on a default device
    kind = dtypes.pop() if len(dtypes) == 1 else array("b", [CODES[t.dtype] for t in tensors])
    done = norm_into(total, pointers, sizes, None, kind, order, threads())
    return total if done else None


def norm_into(
    out: Tensor,
    pointers: array[int],
    sizes: array[int],
    first_chunk: array[int] | None,
    dtype: torch.dtype | array[int],
    order: float,
    threads: int,
) -> bool:
    """Write the norm of N tensors, given by their addresses, to ``out``.

    Args:
        out: a 0-dim float32 or float64 tensor on the CPU.
        pointers: N addresses (``"Q"``) of memory without gaps; alive until this returns.
        sizes: their numbers of elements (``"q"``).
        first_chunk: ``first_chunks(sizes)``; without it, it is counted here.
        dtype: of all of them, or N entries of ``CODES`` (``"b"``).
        order: 2.0 or inf.
        threads: at most so many.

    Returns:
        Whether ``out`` was written. It is not without a compiler, without memory, and where the
        squares of float64 numbers leave the range of float64, which only scaling can tell from
        an infinite norm or a zero one.
    """
    kernel = available()
    if kernel is None:
        return False
    if isinstance(dtype, torch.dtype):
        each, one = None, CODES[dtype]
    else:
        each, one = dtype.buffer_info()[0], -1
    status: int = kernel(
        out.data_ptr(),
        CODES[out.dtype],
        len(pointers),
        pointers.buffer_info()[0],
        sizes.buffer_info()[0],
        None if first_chunk is None else first_chunk.buffer_info()[0],
        each,
        one,
        order == math.inf,
        threads,
    )
    return status == 0


def native_norm(dtypes: Collection[torch.dtype], order: float) -> int | None:
    """The address of the kernel, if it takes the norm of tensors of ``dtypes`` in one call."""
    kernel = available() if len(dtypes) == 1 and SERVED.get(order, set()) >= set(dtypes) else None
    if kernel is None:
        return None
    import ctypes

    return ctypes.cast(kernel, ctypes.c_void_p).value  # type: ignore[arg-type]  # a function of ctypes


def first_chunks(sizes: array[int]) -> array[int]:
    """Where each tensor's chunks start in the list of all chunks; N + 1 entries (``"q"``)."""
    return array("q", itertools.accumulate([-(-n // CHUNK) for n in sizes], initial=0))


@functools.cache
def available() -> Callable[..., int] | None:
    """The kernel, compiled at the first call; ``None`` if that fails. It is tried once."""
    import ctypes

    from compileclip.lowering.cpp.cpp_norm_source import SOURCE
    from compileclip.native import native_build

    code, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    of_type = ctypes.CFUNCTYPE(code, pointer, code, size, *[pointer] * 4, code, code, code)
    try:
        return of_type(("compileclip_norm", native_build.load(SOURCE)))
    except (native_build.CompilerError, OSError):
        return None
