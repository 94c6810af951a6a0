"""How parameters, gradients and state lie in memory, which fused kernels take to be alike."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from compileclip.distributed.shards import is_sharded
from compileclip.lowering.plain_tensors import is_dense

if TYPE_CHECKING:
    from compileclip.native.native_tensors import Library


def are_alike(optimizer: Optimizer, params: Sequence[Tensor]) -> bool:
    """Whether each parameter, its gradient and its state are, where a fused kernel needs it.

    It takes elements in the order of memory, so that others would be updated by each other's.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            break
    else:
        return True
    if _are_contiguous(optimizer, params):
        return True
    states = optimizer.state.values()
    held = chain(params, (p.grad for p in params), chain.from_iterable(map(dict.values, states)))
    try:
        if all(map(Tensor.is_contiguous, held)):
            return True
    except TypeError:  # a number, or None
        pass
    return all(_is_alike(p, optimizer.state.get(p, {})) for p in params)


def _are_contiguous(optimizer: Optimizer, params: Sequence[Tensor]) -> bool:
    """Whether all is known to be contiguous, by a look that costs a tenth of Python's."""
    native = _library()
    if native is None or type(params) is not list:
        return False
    state = optimizer.state
    return bool(native.contiguous(native.torch, _TYPES_AT, params, len(params), state))


@functools.cache
def _library() -> Library | None:
    from compileclip.native.native_tensors import has_library, library  # it may compile that

    return library() if has_library() else None


# What parameters and state may be: tensors, dictionaries of them, and what has no layout.
_TYPES = array("Q", [id(kind) for kind in (Tensor, Parameter, float, int, type(None), dict)])
_TYPES_AT = _TYPES.buffer_info()[0]


def _is_alike(param: Tensor, state: Mapping[str, Any]) -> bool:
    tensors = [t for t in (param.grad, *state.values()) if isinstance(t, Tensor)]
    shaped = [t for t in tensors if t.shape == param.shape and _is_strided(t)]
    if not _is_strided(param) or param.numel() < 2 or not shaped:
        return True
    return is_dense(param) and all(t.stride() == param.stride() for t in shaped)


def are_on_one_mesh(params: Sequence[Tensor]) -> bool:
    """Whether torch's fused and foreach kernels take ``params`` together.

    They take no ``DTensor`` beside plain tensors, or beside those of another mesh.
    """
    return len({p.device_mesh if is_sharded(p) else None for p in params}) <= 1


@contextmanager
def unfused(optimizer: Optimizer) -> Iterator[None]:
    """Within it, the optimizer steps by torch's kernels for single tensors."""
    names = ("fused", "foreach")
    taken = [(group, k) for group in optimizer.param_groups for k in names if group.get(k)]
    for group, name in taken:
        group[name] = False
    try:
        yield
    finally:
        for group, name in taken:
            group[name] = True


def _is_strided(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided
