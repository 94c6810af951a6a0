"""``torch.nn.utils``' four clipping functions, with their signatures and semantics.

What is better here than in torch: the norm of bfloat16 and float16 gradients is computed and
returned in float32 and their scale is applied in float32; sums are taken in float64, so no finite
gradient overflows the norm and no non-zero one vanishes from it; sparse gradients work for p > 0;
in a compiled function the norm is one operator in the graph.

Of ``DTensor`` gradients the norm is that of all ranks, by one all-reduce for each mesh, however
many tensors there are, on whatever meshes, plain ones among them. ``process_group`` adds ranks
that hold other plain parameters, as the stages of a pipeline do.

On a GPU the norm takes one launch per dtype and one more, and to scale or to clamp takes one per
dtype, however many tensors there are; on a CPU both are native kernels.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from compileclip.distributed.shards import any_sharded, as_placed, is_sharded, local, whole
from compileclip.eager import operators, reference
from compileclip.eager.checks import (
    check_foreach,
    check_layouts,
    check_norm_type,
    nonfinite_message,
)
from compileclip.eager.norm_over_ranks import norm_over_ranks
from compileclip.lowering.cpp import cpp_norm as native_norm
from compileclip.lowering.triton import triton_foreach


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
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
        process_group: ranks that hold other plain tensors: a ``ProcessGroup``, a ``DeviceMesh`` or
            a list of these, in each of which this rank is. All of them call this.

    Returns:
        A 0-dim tensor on the device of the first tensor (a plain one for ``DTensor``, with the same
        bits on all ranks), float32, or float64 if a tensor is float64 or complex128. 0.0 for no
        tensors.

    Raises:
        ValueError: ``norm_type`` is NaN, or not positive with sparse tensors; this rank is not in
            ``process_group``.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set, or
            ``foreach=True`` on a device without foreach kernels.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    norm_type = check_norm_type(norm_type)
    if process_group is not None or any_sharded(tensors):
        check_foreach(tensors, foreach)
        with torch.no_grad():
            parts = [whole(t) for t in tensors]
            total = norm_over_ranks(parts, [local(t) for t in parts], norm_type, process_group)
    elif not tensors:
        return torch.tensor(0.0)
    else:
        total = norm_here(tensors, norm_type, foreach)
    return _finite(total, norm_type) if error_if_nonfinite else total


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
    *,
    process_group: Any = None,
) -> Tensor:
    """Clip the total norm of gradients in place, as ``torch.nn.utils.clip_grad_norm_``.

    ``get_total_norm`` of the gradients, then ``clip_grads_with_norm_``: see there.

    Args:
        parameters: one tensor or an iterable of tensors; those without a gradient are left out.
        max_norm: the largest total norm that the gradients may keep.
        norm_type: the order p, any float but NaN.
        error_if_nonfinite: raise, with the gradients untouched, where the norm is NaN or infinite.
        foreach: as in torch.
        process_group: as in ``get_total_norm``. All ranks of it, and of a ``DTensor``'s mesh, call
            this, be they without a gradient.

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
    norm_type, max_norm = check_norm_type(norm_type), float(max_norm)
    if process_group is not None or any_sharded(parameters):
        return _clip_over_ranks(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach, process_group
        )
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
        elif p.grad is not None and is_sharded(p):
            p.grad = as_placed(p.grad, p)  # no clamp distributes over a sum
    grads = [local(reference.values(g)) for g in _grads(parameters)]
    check_foreach(grads, foreach)
    if grads and not torch.compiler.is_compiling() and triton_foreach.clamp_(grads, clip_value):
        return
    if grads and reference.takes_foreach(grads, foreach):
        torch._foreach_clamp_min_(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)
    else:
        for g in grads:
            g.clamp_(min=-clip_value, max=clip_value)


def _natively(tensors: list[Tensor], norm_type: float) -> Tensor | None:
    """The norm of plain tensors, by native code of their device; None where it does not serve."""
    if tensors[0].is_cpu:
        return native_norm.total_norm(tensors, norm_type)
    return triton_foreach.total_norm_again(tensors, norm_type)


def _finite(total_norm: Tensor, norm_type: float) -> Tensor:
    """``total_norm``, which is awaited; an error where it is NaN or infinite."""
    if not total_norm.isfinite():
        raise RuntimeError(nonfinite_message(norm_type, total_norm))
    return total_norm


def norm_here(tensors: list[Tensor], norm_type: float, foreach: bool | None = None) -> Tensor:
    """``get_total_norm`` of at least one tensor, where this rank has all of each."""
    # What native code serves is plain and dense: it needs no further look.
    total = None if torch.compiler.is_compiling() else _natively(tensors, norm_type)
    if total is None:
        check_foreach(tensors, foreach)
        check_layouts(tensors, norm_type)
        with torch.no_grad():
            total = operators.total_norm(tensors, norm_type)
    return total


def _clip_over_ranks(
    parameters: list[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    foreach: bool | None,
    process_group: Any,
) -> Tensor:
    """``clip_grad_norm_`` where ranks hold parts of ``parameters``."""
    check_foreach(_grads(parameters), foreach)
    for p in parameters:
        if p.grad is not None:
            p.grad = as_placed(p.grad, p)
    parts = [None if p.grad is None else local(p.grad) for p in parameters]
    total_norm = norm_over_ranks(parameters, parts, norm_type, process_group)
    if error_if_nonfinite:
        _finite(total_norm, norm_type)
    _clip(_grads(parameters), max_norm, total_norm, foreach)
    return total_norm


def _clip(
    grads: Sequence[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None
) -> None:
    if not grads:
        return
    check_foreach(grads, foreach)
    if is_sharded(total_norm):
        total_norm = total_norm.full_tensor()
    compiling = torch.compiler.is_compiling()
    if not compiling and foreach is not False and triton_foreach.clip_(grads, max_norm, total_norm):
        return
    coef = reference.clip_coef(max_norm, total_norm)
    if not reference.is_one(coef):
        reference.scale_([local(g) for g in grads], coef, foreach)


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
