"""The total norm of many tensors on a GPU: one launch per dtype, and one that adds up.

Each Triton program takes the share of one chunk, in float64 and in an order that only the shape
decides, into a place of its own; one more program adds the shares in their order. Nothing is
accumulated through atomics, so a result does not depend on which program ran first.

Squares of float32 and narrower neither overflow nor vanish in float64. Those of float64 may, so
there a share has three sums, as in J. L. Blue, "A Portable Fortran Program to Find the Euclidean
Norm of a Vector" (1978): of small elements scaled up, of large ones scaled down, and of the others.
A maximum is taken over the bits of absolute values, which are in the order of the values; NaN
stands above infinity there, so it comes through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from compileclip.lowering import UnsupportedError
from compileclip.lowering.triton import block_list, on_device

CHUNK = 16384  # elements per program of the first launch
_STEP = tl.constexpr(2048)  # of them at a time: 16 per thread, 64 bytes of float32 in flight
_SHARES = tl.constexpr(4096)  # at a time in the second launch; three sums of more would spill
_FIRST = {"num_warps": 4, "enable_fp_fusion": False}
_SECOND = {"num_warps": 16, "enable_fp_fusion": False}
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

ORDERS = {1.0: "values", 2.0: "squares", math.inf: "max"}
# Between the first two, squares are normal numbers and 2**52 of them a finite sum; the others bring
# what lies outside to where that holds.
_SMALL, _LARGE = tl.constexpr(2.0**-511), tl.constexpr(2.0**486)
_UP, _DOWN = tl.constexpr(2.0**537), tl.constexpr(2.0**-538)


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The p-norm of ``tensors`` seen as one vector, as ``reference.total_norm``.

    Nothing waits for the device, and what is asked for twice is the same bits.

    Args:
        tensors: at least one, all on one device: float32, float64, float16 or bfloat16.
        norm_type: 1, 2 or infinity.

    Returns:
        A 0-dim tensor in ``reference.norm_dtype(tensors)``.

    Raises:
        UnsupportedError: there is no kernel for a dtype, a layout or the order of the norm.
    """
    if norm_type not in ORDERS:
        raise UnsupportedError(f"there is no Triton kernel for norm_type={norm_type}")
    groups: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        if t.dtype not in _TYPES or t.layout != torch.strided:
            raise UnsupportedError(f"there is no Triton kernel for {t.dtype} in {t.layout}")
        groups.setdefault(t.dtype, []).append(_dense(t))
    device = tensors[0].device
    lists = []
    for dtype, group in groups.items():
        sizes, blocks = _chunks(tuple(t.numel() for t in group), device)
        lists.append(List(on_device([t.data_ptr() for t in group], device), sizes, blocks, dtype))
    return norm_of(lists, norm_type)


@dataclass(frozen=True)
class List:
    """N tensors of one dtype without gaps, on one device.

    Attributes:
        addresses: int64 ``[N]``.
        sizes: int64 ``[N]``: how many elements each has.
        blocks: ``block_list`` of the sizes in blocks of ``CHUNK``.
        dtype: float32, float64, float16 or bfloat16.
    """

    addresses: Tensor
    sizes: Tensor
    blocks: Tensor
    dtype: torch.dtype


def words_of(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """The addresses of the first element of one tensor and of another, word by word of 4 bytes.

    An element of 2 bytes comes with the 2 after it, of which an allocator of GPU memory has more.

    Returns:
        int64 ``[words, 2]`` on ``device``.
    """
    words = [
        (source.data_ptr() + at, target.data_ptr() + at)
        for source, target in pairs
        for at in range(0, source.element_size(), 4)
    ]
    return on_device([address for pair in words for address in pair], device).view(-1, 2)


def norm_of(lists: Sequence[List], norm_type: float, words: Tensor | None = None) -> Tensor:
    """The p-norm of all tensors of ``lists``, at least one, seen as one vector.

    Args:
        lists: on one device.
        norm_type: 1, 2 or infinity.
        words: ``words_of`` what is to be copied on the way: step counts, which the update that
            follows reads from the copy while it stores them.

    Returns:
        A 0-dim tensor, float64 if one of the lists is and else float32.
    """
    device = lists[0].sizes.device
    count = sum(len(each.blocks) for each in lists)
    double = any(each.dtype == torch.float64 for each in lists)
    scaled = double and norm_type == 2
    shares = torch.empty((3 if scaled else 1, count), dtype=torch.float64, device=device)
    total = torch.empty((), dtype=torch.float64 if double else torch.float32, device=device)
    constants = {"ORDER": ORDERS[norm_type], "SCALED": scaled}
    done = 0
    with torch.cuda.device_of(total):
        for each in lists:
            if len(each.blocks):
                dtypes = {"DTYPE": _TYPES[each.dtype], "WIDE": _wide(each.dtype, norm_type)}
                _take_shares[(len(each.blocks),)](
                    *(each.addresses, each.sizes, each.blocks, shares, done, count),
                    **dtypes,
                    CHUNK=CHUNK,
                    **constants,
                    **_FIRST,
                )
            done += len(each.blocks)
        copied = lists[0].addresses if words is None else words  # of which none is read, or all
        number = 0 if words is None else len(words)
        _add_shares[(1,)](shares, total, count, copied, number, **constants, **_SECOND)
    return total


def _wide(dtype: torch.dtype, norm_type: float) -> Any:
    """What shares are taken in; a maximum rounds nothing, and one in float64 is slow."""
    exact = math.isinf(norm_type) and dtype != torch.float64
    return tl.float32 if exact else tl.float64


def _dense(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy without gaps or overlaps; the order of elements does not matter."""
    if tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor
    return tensor.contiguous()


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and ``block_list`` on the device; both are the same at every step."""
    return on_device(sizes, device), block_list(sizes, CHUNK).to(device)


def _jit(*runtime: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``; nothing is compiled again for another value of what ``runtime`` names."""
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(runtime))
    return decorate


@_jit("addresses", "sizes", "blocks", "shares", "done", "count")
def _take_shares(
    addresses: tl.tensor,
    sizes: tl.tensor,
    blocks: tl.tensor,
    shares: tl.tensor,
    done: tl.tensor,
    count: tl.tensor,
    DTYPE: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> None:
    """Each program: the share of one chunk, into ``shares[:, done + program]``."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks + program * 2)
    start = tl.load(blocks + program * 2 + 1).to(tl.int64) * CHUNK
    address = tl.load(addresses + tensor)
    length = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
    # Full steps of aligned tensors run without masks, for loads 16 bytes wide.
    full = tl.where((address & 15) == 0, length // _STEP * _STEP, 0)
    lane = tl.arange(0, _STEP)
    small = tl.zeros([_STEP], WIDE)
    medium = tl.zeros([_STEP], WIDE)
    large = tl.zeros([_STEP], WIDE)
    aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + start
    for first in range(0, full, _STEP):
        x = tl.load(aligned + first + lane).to(WIDE)
        small, medium, large = _accumulate(x, small, medium, large, ORDER, SCALED)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    for first in range(full, length, _STEP):
        x = tl.load(pointer + first + lane, mask=first + lane < length, other=0.0).to(WIDE)
        small, medium, large = _accumulate(x, small, medium, large, ORDER, SCALED)
    share = shares + done + program
    tl.store(share, _reduce(medium, ORDER))
    if SCALED:
        tl.store(share + count, tl.sum(small, 0))
        tl.store(share + 2 * count, tl.sum(large, 0))


@_jit("shares", "total", "count", "words", "number")
def _add_shares(
    shares: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    words: tl.tensor,
    number: tl.tensor,
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> None:
    """One program: the norm from ``count`` shares; and ``number`` words are copied."""
    for word in range(number):
        source = tl.load(words + word * 2).to(tl.pointer_type(tl.int32))
        target = tl.load(words + word * 2 + 1).to(tl.pointer_type(tl.int32))
        tl.store(target, tl.load(source))
    lane = tl.arange(0, _SHARES)
    small = tl.zeros([_SHARES], tl.float64)
    medium = tl.zeros([_SHARES], tl.float64)
    large = tl.zeros([_SHARES], tl.float64)
    for first in range(0, count, _SHARES):
        share, mask = shares + first + lane, first + lane < count
        x = tl.load(share, mask=mask, other=0.0)
        if ORDER == "max":
            medium = tl.maximum(medium, x, propagate_nan=tl.PropagateNan.ALL)
        else:
            medium += x
        if SCALED:
            small += tl.load(share + count, mask=mask, other=0.0)
            large += tl.load(share + 2 * count, mask=mask, other=0.0)
    norm = _reduce(medium, ORDER)
    if SCALED:
        norm = _scaled_root(tl.sum(small, 0), norm, tl.sum(large, 0))
    elif ORDER == "squares":
        norm = tl.sqrt(norm)
    tl.store(total, norm.to(total.dtype.element_ty))


@_jit()
def _accumulate(
    x: tl.tensor,
    small: tl.tensor,
    medium: tl.tensor,
    large: tl.tensor,
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    if ORDER == "max":
        medium = tl.maximum(medium, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    elif ORDER == "values":
        medium += tl.abs(x)
    elif SCALED:
        is_small, is_large = tl.abs(x) < _SMALL, tl.abs(x) > _LARGE
        up, down = tl.where(is_small, x * _UP, 0.0), tl.where(is_large, x * _DOWN, 0.0)
        rest = tl.where(is_small | is_large, 0.0, x)  # NaN is here
        small, large = tl.fma(up, up, small), tl.fma(down, down, large)
        medium = tl.fma(rest, rest, medium)
    else:
        medium = tl.fma(x, x, medium)
    return small, medium, large


@_jit()
def _reduce(x: tl.tensor, ORDER: tl.constexpr) -> tl.tensor:  # noqa: N803
    if ORDER == "max":
        bits = x.to(tl.float64).to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return tl.max(bits, 0).to(tl.float64, bitcast=True)
    else:  # Triton follows one branch alone  # noqa: RET505
        return tl.sum(x, 0)


@_jit()
def _scaled_root(small: tl.tensor, medium: tl.tensor, large: tl.tensor) -> tl.tensor:
    """The root of the three sums; small ones count only beside a sum that is small itself."""
    from_large = tl.sqrt(large + medium * _DOWN * _DOWN) * 2.0**538
    from_small = tl.sqrt(small + medium * _UP * _UP) * 2.0**-537
    use_small = (small > 0) & (medium < 2.0**-400)
    return tl.where(large > 0, from_large, tl.where(use_small, from_small, tl.sqrt(medium)))
