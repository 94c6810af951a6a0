"""``torch.nn.utils``' four clipping functions, with their signatures and semantics.

What is better here than in torch: the norm of bfloat16 and float16 gradients is computed and
returned in float32 and their scale is applied in float32; sums are taken in float64, so no finite
gradient overflows the norm and no non-zero one vanishes from it; sparse gradients work for p > 0;
the norm of sharded gradients comes back reduced over all ranks; and in a compiled function the norm
is one operator in the graph.

On a GPU the norm takes one launch per dtype and one more, and to scale or to clamp takes one per
dtype, however many tensors there are; on a CPU both are native kernels.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from compileclip.eager import operators, reference
from compileclip.lowering.cpp import cpp_norm as native_norm
from compileclip.lowering.triton import triton_foreach

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Compute the p-norm of tensors as if they were one vector.

    Differs from ``torch.nn.utils.get_total_norm`` where torch is weak: see the module's text. As in
    torch, p = 0 counts the *tensors* that have a non-zero element.

    Args:
        tensors: one tensor or an iterable of tensors of any shapes; float16, bfloat16, float32,
            float64 or complex, dense, sparse COO (p > 0 only: they are coalesced, which copies
            their values) or ``DTensor``, on one or several devices.
        norm_type: the order p, any float but NaN, ``inf`` and ``-inf`` included.
        error_if_nonfinite: raise where the norm is NaN or infinite; this waits for the device.
        foreach: as in torch, ``True`` demands a device with foreach kernels. The norm is the same
            whatever is chosen.

    Returns:
        A 0-dim tensor on the device of the first tensor (a plain one for ``DTensor``, reduced over
        all ranks), float32, or float64 if a tensor is float64 or complex128. 0.0 for no tensors.

    Raises:
        ValueError: ``norm_type`` is NaN, or not positive with sparse tensors.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set, or
            ``foreach=True`` on a device without foreach kernels.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = _check_norm_type(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    # What native code serves is plain and dense: it needs no further look.
    total = None if torch.compiler.is_compiling() else _natively(tensors, norm_type)
    if total is None:
        _check_foreach(tensors, foreach)
        _check_layouts(tensors, norm_type)
        total = _total_norm(tensors, norm_type)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(nonfinite_message(norm_type, total))
    return total


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    The formula is that of ``torch.nn.utils.clip_grads_with_norm_``. The scale of float16 and
    bfloat16 gradients is applied in float32, where torch may round it to their dtype first. Nothing
    is written where the factor is 1.

    Args:
        parameters: one tensor or an iterable of tensors; those without a gradient are left out.
        max_norm: the largest total norm that the gradients may keep.
        total_norm: a 0-dim tensor, the norm of the gradients before clipping.
        foreach: as in torch: ``None`` takes foreach kernels where there are some, ``False`` never,
            ``True`` demands them.

    Raises:
        RuntimeError: ``foreach=True`` on a device without foreach kernels.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    max_norm = float(max_norm)
    quick = foreach is None and not torch.compiler.is_compiling()
    if (
        quick
        and triton_foreach.on_gradients(parameters, None, "clip", max_norm, total_norm) is not None
    ):
        return
    _clip(_grads(parameters), max_norm, total_norm, foreach)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the total norm of gradients in place, as ``torch.nn.utils.clip_grad_norm_``.

    ``get_total_norm`` of the gradients, then ``clip_grads_with_norm_``: see there.

    Args:
        parameters: one tensor or an iterable of tensors; those without a gradient are left out.
        max_norm: the largest total norm that the gradients may keep.
        norm_type: the order p, any float but NaN.
        error_if_nonfinite: raise, with the gradients untouched, where the norm is NaN or infinite.
        foreach: as in torch.

    Returns:
        The total norm before clipping: a 0-dim tensor, float32 or float64.

    Raises:
        ValueError: as ``get_total_norm``.
        RuntimeError: as ``get_total_norm``.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)  # it is read twice
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=3,
            )
    norm_type, max_norm = _check_norm_type(norm_type), float(max_norm)
    if foreach is None and not error_if_nonfinite and not torch.compiler.is_compiling():
        total_norm = triton_foreach.on_gradients(parameters, norm_type, "clip", max_norm)
        if total_norm is not None:
            return total_norm
    grads = _grads(parameters)
    total_norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    _clip(grads, max_norm, total_norm, foreach)
    return total_norm


@torch.no_grad()
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp gradients in place to ``[-clip_value, clip_value]``, as ``torch.nn.utils``.

    A sparse gradient is coalesced first (a clamp does not distribute over a sum), so ``p.grad`` may
    be another tensor afterwards.

    Args:
        parameters: one tensor or an iterable of tensors; those without a gradient are left out.
        clip_value: the largest absolute value that a gradient's element may keep.
        foreach: as in ``clip_grads_with_norm_``.

    Raises:
        RuntimeError: ``foreach=True`` on a device without foreach kernels.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    clip_value = float(clip_value)
    quick = foreach is None and not torch.compiler.is_compiling()
    if quick and triton_foreach.on_gradients(parameters, None, "clamp", clip_value) is not None:
        return
    for p in parameters:
        if p.grad is not None and p.grad.layout == torch.sparse_coo:
            p.grad = p.grad.coalesce()
    grads = [reference.values(g) for g in _grads(parameters)]
    _check_foreach(grads, foreach)
    if grads and not torch.compiler.is_compiling() and triton_foreach.clamp_(grads, clip_value):
        return
    if grads and reference.takes_foreach([local(g) for g in grads], foreach):
        torch._foreach_clamp_min_(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)
    else:
        for g in grads:
            g.clamp_(min=-clip_value, max=clip_value)


def nonfinite_message(norm_type: float, total_norm: Tensor) -> str:
    """What to tell whoever asked for an error on a non-finite norm."""
    return (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite "
        f"({total_norm.item()}), so it cannot be clipped. Nothing was changed. Look for the "
        "gradient that is NaN or infinite (torch.autograd.set_detect_anomaly(True) finds where it "
        "arose), or do without this error: `error_if_nonfinite=False` of the functions, "
        '`nonfinite="skip"` of the wrapper'
    )


def local(tensor: Tensor) -> Tensor:
    """The shard of a ``DTensor`` that this rank holds; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.to_local()
    return shard


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    # Importing DTensor takes longer than importing torch; who holds one has imported it.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and bool(isinstance(tensor, module.DTensor))


def _natively(tensors: list[Tensor], norm_type: float) -> Tensor | None:
    """The norm of plain tensors, by native code of their device; None where it does not serve."""
    if tensors[0].is_cpu:
        return native_norm.total_norm(tensors, norm_type)
    return triton_foreach.total_norm_again(tensors, norm_type)


@torch.no_grad()
def _total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    if any(map(is_sharded, tensors)):
        return _sharded_total_norm(tensors, norm_type)
    return operators.total_norm(tensors, norm_type)


def _clip(
    grads: Sequence[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None
) -> None:
    if not grads:
        return
    _check_foreach(grads, foreach)
    if is_sharded(total_norm):
        total_norm = total_norm.full_tensor()
    compiling = torch.compiler.is_compiling()
    if not compiling and foreach is not False and triton_foreach.clip_(grads, max_norm, total_norm):
        return
    coef = reference.clip_coef(max_norm, total_norm)
    if not reference.is_one(coef):
        reference.scale_([local(g) for g in grads], coef, foreach)


def _sharded_total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm where some tensors are sharded: one reduction over the ranks per tensor."""
    norms = []
    for t in tensors:
        wide = torch.promote_types(t.dtype, torch.float64)
        norm = torch.linalg.vector_norm(t, norm_type, dtype=wide)
        norms.append(norm.full_tensor() if is_sharded(norm) else norm)
    device = local(tensors[0]).device
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)
    return total.to(reference.norm_dtype(tensors))


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    if not foreach:
        return
    for device in {t.device for t in tensors}:
        if not _device_has_foreach_support(device):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {device.type} "
                "tensors; pass foreach=None"
            )


def _check_norm_type(norm_type: float) -> float:
    norm_type = float(norm_type)
    if norm_type != norm_type:  # NaN; Dynamo knows no isnan of a float that varies
        raise ValueError(
            "norm_type is nan, which is no order of a norm; pass a number or float('inf')"
        )
    return norm_type


def _check_layouts(tensors: Sequence[Tensor], norm_type: float) -> None:
    for t in tensors:
        if t.layout == torch.strided or (t.layout == torch.sparse_coo and norm_type > 0):
            continue
        if t.layout == torch.sparse_coo:
            raise ValueError(
                f"norm_type={norm_type} of a sparse gradient: for p <= 0 the zeros that it does "
                "not store would decide the norm; take p > 0 or dense gradients"
            )
        raise ValueError(
            f"a gradient with layout {t.layout} has no total norm here; convert it with "
            ".to_dense() or .to_sparse()"
        )
