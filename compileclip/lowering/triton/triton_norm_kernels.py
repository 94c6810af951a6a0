"""The kernels of ``triton_norm.py``, and what ends a norm within another kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

from compileclip.lowering.triton.triton_math import quotient

STEP = tl.constexpr(2048)  # of them at a time: 16 per thread, 64 bytes of float32 in flight
_SHARES = tl.constexpr(4096)  # at a time in the second launch; three sums of more would spill
# Between the first two, squares are normal numbers and 2**52 of them a finite sum; the others bring
# what lies outside to where that holds.
_SMALL, _LARGE = tl.constexpr(2.0**-511), tl.constexpr(2.0**486)
_UP, _DOWN = tl.constexpr(2.0**537), tl.constexpr(2.0**-538)


def _jit(*runtime: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit``; nothing is compiled again for another value of what ``runtime`` names."""
    decorate: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(runtime))
    return decorate


@_jit("addresses", "sizes", "blocks", "shares", "done", "count")
def take_shares(
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
    full = tl.where((address & 15) == 0, length // STEP * STEP, 0)
    lane = tl.arange(0, STEP)
    small = tl.zeros([STEP], WIDE)
    medium = tl.zeros([STEP], WIDE)
    large = tl.zeros([STEP], WIDE)
    aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + start
    for first in range(0, full, STEP):
        x = tl.load(aligned + first + lane).to(WIDE)
        small, medium, large = _accumulate(x, small, medium, large, ORDER, SCALED)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    for first in range(full, length, STEP):
        x = tl.load(pointer + first + lane, mask=first + lane < length, other=0.0).to(WIDE)
        small, medium, large = _accumulate(x, small, medium, large, ORDER, SCALED)
    share = shares + done + program
    tl.store(share, _reduce(medium, ORDER))
    if SCALED:
        tl.store(share + count, tl.sum(small, 0))
        tl.store(share + 2 * count, tl.sum(large, 0))


@_jit("shares", "total", "count")
def add_shares(
    shares: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> None:
    """One program: the norm from ``count`` shares."""
    norm = _added_up(shares, count, ORDER, SCALED)
    tl.store(total, norm.to(total.dtype.element_ty))


@_jit()
def ended_norm(
    shares: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    scale: tl.tensor,
    SCALES: tl.constexpr,  # noqa: N803
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The norm: from ``count`` shares, and stored to ``total``; or what lies there if that is 0.

    Where it SCALES, ``scale`` is taken out of what the shares make.
    """
    if count > 0:
        norm = _added_up(shares, count, ORDER, SCALED).to(total.dtype.element_ty)
        if SCALES:
            norm = quotient(norm, scale.to(norm.dtype))
        tl.store(total, norm)
    else:
        norm = tl.load(total)
    return norm


@_jit()
def _added_up(
    shares: tl.tensor,
    count: tl.tensor,
    ORDER: tl.constexpr,  # noqa: N803
    SCALED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
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
    return norm


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
