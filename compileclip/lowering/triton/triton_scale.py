"""Scale or clamp lists of tensors in place on a GPU: one launch per dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from compileclip.lowering.triton.triton_kernel import packs
from compileclip.lowering.triton.triton_math import maximum, minimum, narrowed, reciprocal, widened
from compileclip.lowering.triton.triton_norm import CHUNK, TYPES, List
from compileclip.native.cuda_driver import Launch

_STEP = tl.constexpr(2048)  # elements at a time
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def write(lists: Sequence[List], number: Tensor | None, kind: str, bound: float) -> list[Launch]:
    """Launch one kernel per list on the current stream; nothing waits for the device.

    A list's elements are multiplied in float32, or float64 if they are float64.

    Args:
        lists: on one device; no two tensors share memory.
        number: a 0-dim tensor on the device, float32 or float64: a factor, or the total norm.
        kind: "scale": by ``number``. "clip": by ``min(1, bound / (number + 1e-6))``, computed in
            the dtype of ``number`` as torch does. "clamp": to ``[-bound, bound]``.
        bound: see there.

    Returns:
        What was launched.
    """
    launches = []
    for each in lists:
        if not len(each.blocks):
            continue
        dtype = TYPES[each.dtype]
        read = each.sizes if number is None else number  # of which a clamp reads nothing
        constants = {
            "DTYPE": dtype,
            "COMPUTE": tl.float64 if each.dtype == torch.float64 else tl.float32,
            "KIND": kind,
            "CHUNK": CHUNK,
            "PACKED": packs(each.sizes.device),
            **_OPTIONS,
        }
        args = (each.addresses, each.sizes, each.blocks, read, bound)
        with torch.cuda.device_of(each.sizes):
            launches.append(Launch(_write, len(each.blocks), args, constants))
            launches[-1].run()
    return launches


@triton.jit(do_not_specialize=["addresses", "sizes", "blocks", "number", "bound"])  # type: ignore[untyped-decorator, unused-ignore]
def _write(
    addresses: tl.tensor,
    sizes: tl.tensor,
    blocks: tl.tensor,
    number: tl.tensor,
    bound: tl.float64,
    DTYPE: tl.constexpr,  # noqa: N803
    COMPUTE: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
) -> None:
    """Each program: one chunk of one tensor."""
    bound = tl.full((), bound, tl.float64)  # to the interpreter, a float
    factor = bound.to(COMPUTE)
    if KIND == "scale":
        factor = tl.load(number).to(COMPUTE)
    if KIND == "clip":
        norm = tl.load(number)
        one = tl.full((), 1.0, norm.dtype)
        small = tl.full((), 1e-6, norm.dtype)
        factor = minimum(reciprocal(norm + small) * bound.to(norm.dtype), one).to(COMPUTE)
    same = (factor == 1.0) & (KIND != "clamp")  # times 1 is what is there
    if same == 0:
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(blocks + program * 2)
        start = tl.load(blocks + program * 2 + 1).to(tl.int64) * CHUNK
        address = tl.load(addresses + tensor)
        length = tl.minimum(tl.load(sizes + tensor) - start, CHUNK).to(tl.int32)
        # Full steps of aligned tensors run without masks, for accesses 16 bytes wide.
        full = tl.where((address & 15) == 0, length // _STEP * _STEP, 0)
        lane = tl.arange(0, _STEP)
        aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + start
        for first in range(0, full, _STEP):
            at = aligned + first + lane
            tl.store(at, _written(tl.load(at), factor, DTYPE, COMPUTE, KIND, PACKED))
        pointer = address.to(tl.pointer_type(DTYPE)) + start
        for first in range(full, length, _STEP):
            at, mask = pointer + first + lane, first + lane < length
            x = tl.load(at, mask=mask)
            tl.store(at, _written(x, factor, DTYPE, COMPUTE, KIND, PACKED), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _written(
    x: tl.tensor,
    factor: tl.tensor,
    DTYPE: tl.constexpr,  # noqa: N803
    COMPUTE: tl.constexpr,  # noqa: N803
    KIND: tl.constexpr,  # noqa: N803
    PACKED: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    half: tl.constexpr = DTYPE.primitive_bitwidth == 16
    wide = widened(x, PACKED) if half else x
    result = wide * factor
    if KIND == "clamp":
        result = minimum(maximum(wide, factor * -1.0), factor)
    return narrowed(result, DTYPE, PACKED) if half else result
