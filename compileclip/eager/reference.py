"""The semantics of clipping in plain eager PyTorch: oracle, baseline and fallback of every mode.

Nothing here reads a value back to the host. What is private to torch and used here (read in torch
2.11 to 2.13): ``_device_has_foreach_support``, ``_group_tensors_by_device_and_dtype`` and
``_amp_foreach_non_finite_check_and_unscale_``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._foreach_utils import (
    _device_has_foreach_support,
    _group_tensors_by_device_and_dtype,
)

from compileclip.lowering.cpp import cpp_norm as native_norm
from compileclip.lowering.cpp import cpp_scale as native_scale
from compileclip.lowering.plain_tensors import runs_for_real
from compileclip.lowering.triton import triton_foreach

# Where a norm is accumulated in a wider dtype than the gradient's, a CPU kernel first casts a copy.
# Pieces of this many elements keep that copy small, and in the cache.
_PIECE = 1 << 16
# So many elements at a time are multiplied in a float32 copy.
_WIDENED = 1 << 24

HALF = (torch.float16, torch.bfloat16)


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the total norm: the real dtype that ``tensors`` promote to, float32 or wider."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors)).to_real()
    return torch.float32 if dtype in HALF else dtype


def values(tensor: Tensor) -> Tensor:
    """``tensor``, or of a sparse one the values that a norm or an elementwise update acts on."""
    return tensor.coalesce()._values() if tensor.layout == torch.sparse_coo else tensor


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The p-norm of ``tensors`` seen as one vector, as ``torch.nn.utils.get_total_norm``.

    Sums are taken in float64, so that no square of a finite float32 overflows or underflows and
    the rounding of long sums does not show. Gradients that reach further than the sums do (float64,
    or a large p) are first scaled by a power of two, which is exact.

    A kernel of ours takes the norms that it serves: on a CPU a native one, where float32 norms of
    p = 2 are the same but for the order of the sums in float64, and on a GPU the one of mode
    ``multi_tensor``, so that a mode does not change the norm.

    Args:
        tensors: at least one tensor, floating point or complex, of any shape, dtype and device.
        norm_type: the order p; any float but NaN.
        dtype: of the norm, float64 or ``norm_dtype(tensors)``, which it is by default.

    Returns:
        A 0-dim tensor on the device of the first tensor.
    """
    native = native_norm.total_norm(tensors, norm_type, dtype)
    if native is None:
        native = triton_foreach.total_norm(tensors, norm_type, dtype)
    if native is not None:
        return native
    devices = dict.fromkeys(t.device for t in tensors)
    if len(devices) == 1 or norm_type not in triton_foreach.ORDERS:
        return _total_norm(tensors, norm_type, dtype)
    each = [total_norm([t for t in tensors if t.device == d], norm_type, dtype) for d in devices]
    there = [n.to(tensors[0].device) for n in each]
    return _total_norm(there, norm_type, dtype or norm_dtype(tensors))


@torch.no_grad()
def _total_norm(
    tensors: Sequence[Tensor], norm_type: float, dtype: torch.dtype | None = None
) -> Tensor:
    """``total_norm`` by torch's own operators."""
    dtype, device = dtype or norm_dtype(tensors), tensors[0].device
    dense = [values(t) for t in tensors]
    if norm_type < 0 or math.isinf(norm_type):
        # An empty tensor has no extreme value; without it the norm of the others is defined.
        dense = [t for t in dense if t.numel()]
        if not dense:
            return torch.zeros((), dtype=dtype, device=device)
    scale = _power_of_two_scale(dense, norm_type) if overreaches(dense, norm_type) else None
    norms = [
        norm.to(device)
        for _, _, group in _by_device_and_dtype(dense)
        for norm in _tensor_norms(group, norm_type, scale)
    ]
    # Norms of several devices and dtypes meet here; stack promotes them.
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if scale is not None:
        total = total / scale.to(device)
    return total.to(dtype)


def clip_coef(max_norm: float, total_norm: Tensor) -> Tensor:
    """``min(1, max_norm / (total_norm + 1e-6))``, the factor that ``clip_grads_with_norm_`` takes.

    Computed as torch does (a reciprocal and a product), for the same bits.
    """
    return torch.clamp(torch.reciprocal(total_norm + 1e-6) * max_norm, max=1.0)


def is_one(scale: Tensor) -> bool:
    """Whether to multiply by ``scale`` changes nothing, where to ask does not wait for a device."""
    if torch.compiler.is_compiling() or type(scale) is not Tensor or not scale.is_cpu:
        return False
    try:
        return runs_for_real() and scale.item() == 1.0
    except RuntimeError:  # one of functorch's, which stands for many
        return False


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], scale: Tensor, foreach: bool | None = None) -> None:
    """Multiply ``tensors`` in place by ``scale``, a 0-dim real tensor.

    ``foreach`` is as in torch. Kernels of ours take what they serve, but for ``False``.
    float16 and bfloat16 tensors are multiplied by ``scale`` in float32 and rounded once; torch's
    ``mul_`` on a GPU would round ``scale`` to their dtype first.
    """
    compiling = torch.compiler.is_compiling()
    if not tensors or (not compiling and foreach is not False and _scaled(tensors, scale)):
        return
    # Scaling is linear, so the values of a sparse tensor need not be coalesced for it.
    dense = [t._values() if t.layout == torch.sparse_coo else t for t in tensors]
    if compiling:
        # A graph wants no opaque operator here, but pointwise ones that fuse.
        for t in dense:
            t.copy_(t.float() * scale) if t.dtype in HALF else t.mul_(scale)
        return
    foreach = takes_foreach(dense, foreach)
    for device, dtype, group in _by_device_and_dtype(dense):
        factor = scale.to(device)
        if dtype in HALF:
            factor = factor.to(torch.float32)
            if dtype == torch.bfloat16 and device.type != "cpu":
                _multiply_widened(group, factor)
                continue
            unused = torch.zeros_like(factor)
            torch._amp_foreach_non_finite_check_and_unscale_(group, unused, factor)
        elif foreach:
            torch._foreach_mul_(group, factor)
        else:
            for t in group:
                t.mul_(factor)


def _scaled(tensors: Sequence[Tensor], scale: Tensor) -> bool:
    return native_scale.scale_(tensors, scale) or triton_foreach.scale_(tensors, scale)


def _multiply_widened(group: Sequence[Tensor], factor: Tensor) -> None:
    """What torch's kernel for GradScaler does, which on a GPU does not take bfloat16."""
    for piece in _in_pieces(group, _WIDENED):
        wide = [torch.empty_like(t, dtype=torch.float32) for t in piece]
        torch._foreach_copy_(wide, piece)
        torch._foreach_mul_(wide, factor)
        torch._foreach_copy_(piece, wide)


def _in_pieces(group: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Views of ``group``, ``most`` elements at a time, or one tensor with gaps that has more."""
    piece: list[Tensor] = []
    left = most
    for t in group:
        for part in t.view(-1).split(most) if t.is_contiguous() else [t]:
            if piece and part.numel() > left:
                yield piece
                piece, left = [], most
            piece.append(part)
            left -= part.numel()
    if piece:
        yield piece


def takes_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> bool:
    """Whether to call foreach kernels; by itself torch takes them for plain tensors only."""
    if foreach is None:
        foreach = all(type(t) is Tensor and t.layout == torch.strided for t in tensors)
    return foreach and all(map(_device_has_foreach_support, {t.device for t in tensors}))


def _by_device_and_dtype(
    tensors: list[Tensor],
) -> list[tuple[torch.device, torch.dtype, list[Tensor]]]:
    """``tensors`` in groups, as torch's foreach functions take them."""
    lists: list[list[Any]] = [tensors]  # to torch, ``None`` may be among them
    groups: dict[Any, Any] = _group_tensors_by_device_and_dtype(lists)
    return [(device, dtype, group) for (device, dtype), ((group,), _) in groups.items()]


def _accumulate_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _exponent_reach(dtype: torch.dtype) -> float:
    """The largest |log2| of a finite non-zero number of ``dtype``, subnormal ones included."""
    info = torch.finfo(dtype)
    return max(math.log2(info.max), -math.log2(info.tiny) - math.log2(info.eps))


def overreaches(tensors: Sequence[Tensor], norm_type: float) -> bool:
    """Whether a sum of ``|x| ** p`` could leave the range that it is accumulated in."""
    if norm_type == 0 or math.isinf(norm_type):
        return False
    return any(
        # 50 binary orders are left for the number of terms.
        abs(norm_type) * _exponent_reach(dtype.to_real())
        > math.log2(torch.finfo(_accumulate_dtype(device)).max) - 50
        for dtype, device in {(t.dtype, t.device) for t in tensors}
    )


def _power_of_two_scale(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """A power of two that brings the element which governs the p-norm near 1."""
    extreme = math.copysign(math.inf, norm_type)
    device, wide = tensors[0].device, _accumulate_dtype(tensors[0].device)
    peaks = [torch.linalg.vector_norm(t, extreme).to(device, wide) for t in tensors if t.numel()]
    if not peaks:
        return torch.ones((), dtype=wide, device=device)
    peak = torch.linalg.vector_norm(torch.stack(peaks), extreme)
    peak = torch.where(peak.isfinite() & (peak > 0), peak, 1.0)
    # Within these bounds the power and its reciprocal are both normal numbers.
    limit = 2.0 ** (math.floor(math.log2(torch.finfo(wide).max)) - 3)
    peak = peak.clamp(1.0 / limit, limit)
    # mantissa = peak * 2**-exponent, and dividing by peak is exact because the quotient is a power
    # of two. (exp2 and ldexp promise no exact result, and ldexp would go through float32.)
    return torch.frexp(peak).mantissa / peak


def _tensor_norms(group: list[Tensor], norm_type: float, scale: Tensor | None) -> Sequence[Tensor]:
    """The p-norms of tensors of one device and dtype, in the dtype that sums are taken in."""
    device, dtype = group[0].device, group[0].dtype
    if norm_type == 0 or math.isinf(norm_type):
        # Nothing is summed, or (p = 0) only whether a sum is 0 is asked for.
        return torch._foreach_norm(group, norm_type)
    wide = torch.promote_types(_accumulate_dtype(device), dtype)  # complex stays complex
    if scale is not None:
        factor = scale.to(device)
        return [torch.linalg.vector_norm(t.to(wide) * factor, norm_type) for t in group]
    pieces = group if wide == dtype or device.type != "cpu" else list(_cpu_pieces(group))
    return torch._foreach_norm(pieces, norm_type, dtype=wide)


def _cpu_pieces(group: Sequence[Tensor]) -> Iterator[Tensor]:
    for t in group:
        if t.numel() <= _PIECE:
            yield t
        else:
            yield from t.reshape(-1).split(_PIECE)
