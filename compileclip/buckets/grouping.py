"""Sort parameters into buckets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import Bucket
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.lowering.plain_tensors import is_dense

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NotServedError(ValueError):
    """A parameter cannot be in a bucket; the message says why."""


def sort(
    optimizer: Optimizer, params: Sequence[Tensor], stays: Collection[int] = ()
) -> tuple[list[Bucket], list[tuple[Tensor, str]]]:
    """Sort ``params``, which have gradients, into buckets.

    Args:
        optimizer: whose parameters they are.
        params: the parameters.
        stays: the parameter groups whose step counts are to stay on the device.

    Returns:
        The buckets, and each parameter that is in none with the reason.
    """
    group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if len(group_of) < sum(len(group["params"]) for group in optimizer.param_groups):
        return [], [(p, "the groups hold a parameter twice") for p in params]
    found: list[Bucket] = []
    refused: list[tuple[Tensor, str]] = []
    values = _counts(params, optimizer)
    skips_none = is_torchs_own(optimizer)
    members: dict[Any, list[Tensor]] = {}
    kinds: dict[Any, tuple[dict[str, torch.dtype], dict[str, Any], tuple[str, ...]]] = {}
    for p in params:
        try:
            state = optimizer.state.get(p, {})
            if skips_none:  # torch takes None for no state
                state = {name: value for name, value in state.items() if value is not None}
            key, kind = _kind(p, state, group_of[p], values)
        except NotServedError as reason:
            refused.append((p, str(reason)))
            continue
        members.setdefault(key, []).append(p)
        kinds[key] = kind
    if members and _overlap(params, optimizer):
        return [], [(p, "parameters or their state share memory") for p in params]
    for key, tensors in members.items():
        dtypes, counts, numbers = kinds[key]
        states = [optimizer.state.get(p, {}) for p in tensors]
        on_device = key[0] in stays
        found.append(Bucket(key[0], tensors, states, dtypes, dict(counts), numbers, on_device))
    return found, refused


def _counts(params: Sequence[Tensor], optimizer: Optimizer) -> dict[int, float]:
    """The values of 0-dim state by its identity; a device is waited for once."""
    tensors = [
        v
        for p in params
        for v in optimizer.state.get(p, {}).values()
        if isinstance(v, Tensor) and v.dim() == 0
    ]
    found: dict[int, float] = {}
    for place in {(t.device, t.dtype) for t in tensors}:
        alike = [t for t in tensors if (t.device, t.dtype) == place]
        found.update(zip(map(id, alike), torch.stack(alike).tolist(), strict=True))
    return found


def _kind(p: Tensor, state: dict[str, Any], group: int, known: Mapping[int, float]) -> Any:
    """A key that all parameters of a bucket share, and what a bucket is made of."""
    if type(p) not in (Tensor, torch.nn.Parameter):
        raise NotServedError(f"a parameter is a {type(p).__name__}")
    if p.dim() == 0:
        raise NotServedError("a parameter is 0-dim")
    grad = p.grad
    assert grad is not None
    if grad.layout != torch.strided or type(grad) is not Tensor:
        raise NotServedError("a gradient is sparse or no plain tensor")
    if any(t.is_inference() for t in (p, grad, *state.values()) if isinstance(t, Tensor)):
        raise NotServedError("a parameter, gradient or state was made in torch.inference_mode()")
    kept = [v for v in state.values() if isinstance(v, Tensor) and v.layout == torch.strided]
    if grad.numel() and any(grad.data_ptr() == t.data_ptr() for t in (p, *kept)):
        raise NotServedError("a gradient is its parameter or state, which a step writes meanwhile")
    negated = p.is_neg() or any(v.is_neg() for v in state.values() if isinstance(v, Tensor))
    if negated or (grad.is_neg() and grad.stride() == p.stride()):  # else it is copied
        raise NotServedError("a parameter, gradient or state is to be negated when it is read")
    if p.dtype not in DTYPES or grad.dtype not in DTYPES:
        raise NotServedError(f"a parameter is {p.dtype}, with a gradient in {grad.dtype}")
    if not is_dense(p):
        raise NotServedError(f"a parameter of shape {tuple(p.shape)} has gaps in memory")
    dtypes = {"param": p.dtype, "grad": grad.dtype}
    counts: dict[str, Any] = {}
    numbers: list[tuple[str, type, Any]] = []
    for name, value in state.items():
        if isinstance(value, bool | int | float | None):
            numbers.append((name, type(value), value))
        elif not isinstance(value, Tensor) or name in dtypes:
            raise NotServedError(f"the state {name!r} is a {type(value).__name__}")
        elif value.dim() == 0 and value.device in (torch.device("cpu"), p.device):
            if value.device.type == "cpu" and value.is_shared():
                raise NotServedError(f"the state {name!r} lies in memory that processes share")
            counts[name] = value
        elif value.shape == p.shape and value.stride() == p.stride() and value.dtype in DTYPES:
            if value.device != p.device or type(value) is not Tensor:
                raise NotServedError(f"the state {name!r} lies elsewhere")
            dtypes[name] = value.dtype
        else:
            raise NotServedError(f"the state {name!r} is not shaped as its parameter")
    values = tuple((name, v.dtype, v.device, known[id(v)]) for name, v in counts.items())
    key = (group, p.device, tuple(dtypes.items()), values, tuple(numbers))
    return key, (dtypes, counts, tuple(name for name, *_ in numbers))


def overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether two of ``tensors`` may share memory."""
    spans = sorted(filter(None, map(_span, tensors)))
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def _overlap(params: Sequence[Tensor], optimizer: Optimizer) -> bool:
    """Whether two tensors that a step writes, in a bucket or not, share memory."""
    states = (
        v
        for p in params
        for v in optimizer.state.get(p, {}).values()
        if isinstance(v, Tensor) and v.dim() > 0
    )
    return overlap(chain(params, states))


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """From where to where a tensor's elements lie; None if it has no memory of its own."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous() or not tensor.numel():
        return start, start + tensor.numel() * size
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size
