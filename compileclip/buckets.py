"""Sort parameters into buckets: those that one program serves with the same scalars."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.lowering.plain import is_dense

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class StaleError(Exception):
    """Parameters, gradients or state are no longer what a bucket was made of."""


class NotServedError(ValueError):
    """A parameter cannot be in a bucket; the message says why."""


@dataclass
class Bucket:
    """Parameters of one group with the same dtypes and the same kinds and numbers of state.

    Attributes:
        group: index of the parameter group.
        params: the parameters, each dense and with a gradient.
        states: the state of each.
        dtypes: of the operands: "param", "grad", and the state of the parameter's shape.
        counts: the 0-dim tensors of the state, per name all parameters' in one buffer, on a CPU or
            on the parameters' device.
        numbers: the names of the state that is numbers.
        stays: whether the counts are operands, on the parameters' device; no host knows them then.
        values: of what a host knows of ``counts`` and ``numbers``, those of each parameter.
        seen: of counts that stay, what they were when this step began, each 0-dim.
    """

    group: int
    params: list[Tensor]
    states: list[dict[str, Any]]
    dtypes: dict[str, torch.dtype]
    counts: dict[str, Tensor] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    stays: bool = False

    def __post_init__(self) -> None:
        self.sizes = array("q", map(Tensor.numel, self.params))
        self._on_host: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self._share_counts()
        self.values: dict[str, Any] = {
            k: v.item() if isinstance(v, Tensor) else v for k, v in self.leader.items()
        }

    def extended(self, made: Mapping[str, Any]) -> Bucket:
        """This bucket with state that a step has made, allocated for each parameter.

        Args:
            made: by name, what a shadow has as new state.

        Raises:
            RuntimeError: there is no memory for it; then nothing is allocated.
        """
        dtypes, counts, numbers = dict(self.dtypes), dict(self.counts), list(self.numbers)
        for name, value in made.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                dtypes[name] = value.dtype
            elif isinstance(value, Tensor):
                counts[name] = value
            else:
                numbers.append(name)
        new = [
            {
                name: torch.empty_like(p, dtype=value.dtype) if name in dtypes else copy(value)
                for name, value in made.items()
            }
            for p in self.params
        ]
        for state, added in zip(self.states, new, strict=True):
            state.update(added)
        return replace(self, dtypes=dtypes, counts=counts, numbers=tuple(numbers))

    def advance(self, state: dict[str, Any]) -> None:
        """Take over what a step leaves as the leader's ``state``: step counts and the like.

        Args:
            state: numbers, and 0-dim tensors on a CPU or their values.
        """
        for name, buffer in self.counts.items():
            if name in self.seen:
                continue  # a kernel has stored it
            found = state[name]
            value = found.item() if isinstance(found, Tensor) else found  # it is on the host
            self.values[name] = value
            if name in self._on_host:
                self._on_host[name].fill_(value)
            if buffer is not found:
                buffer.fill_(value)
        for name in self.numbers:
            self.values[name] = state[name]
            for other in self.states:
                other[name] = state[name]
        self._versions = [(buffer, buffer._version) for buffer in self.counts.values()]

    def counts_are_unchanged(self) -> bool:
        """Whether nothing has written to the counts since the last step."""
        return all(buffer._version == version for buffer, version in self._versions)

    @property
    def known(self) -> set[str]:
        """The names of the state."""
        return {*self.dtypes, *self.counts, *self.numbers}

    @property
    def leader(self) -> dict[str, Any]:
        """What a shadow needs of the state besides operands."""
        first = self.states[0]
        names = [name for name in (*self.counts, *self.numbers) if name not in self.seen]
        return {name: first[name] for name in names} | self._on_host

    def look(self) -> None:
        """Take what counts that stay are now as ``seen``; nothing waits."""
        for name, seen in self.seen.items():
            seen.copy_(self.counts[name].view(-1)[0])

    def _share_counts(self) -> None:
        """Make the 0-dim tensors of each name views of one buffer, which one call fills."""
        for name in self.counts:
            first, count = self.states[0][name], len(self.states)
            place = self.params[0].device if self.stays else first.device
            if first.device == place and _lie_in_a_row([state[name] for state in self.states]):
                # Left where they are: a captured step may count there.
                buffer = first if count == 1 else first.as_strided((count,), (1,))
            else:
                buffer = first.expand(count).clone().to(place)
                for state, view in zip(self.states, buffer.unbind(), strict=True):
                    state[name] = view
            self.counts[name] = buffer
            if self.stays:
                self.seen[name] = torch.empty_like(buffer.view(-1)[0])
            elif buffer.device.type != "cpu":
                self._on_host[name] = first.cpu()
        self._versions = [(buffer, buffer._version) for buffer in self.counts.values()]


def _lie_in_a_row(tensors: Sequence[Tensor]) -> bool:
    """Whether 0-dim tensors are views of one buffer, one after the other."""
    first = tensors[0]
    start, size, storage = first.data_ptr(), first.element_size(), first.untyped_storage()._cdata
    return all(
        t.data_ptr() == start + i * size and t.untyped_storage()._cdata == storage
        for i, t in enumerate(tensors)
    )


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
    found: list[Bucket] = []
    refused: list[tuple[Tensor, str]] = []
    values = _counts(params, optimizer)
    members: dict[Any, list[Tensor]] = {}
    kinds: dict[Any, tuple[dict[str, torch.dtype], dict[str, Any], tuple[str, ...]]] = {}
    for p in params:
        try:
            key, kind = _kind(p, optimizer.state.get(p, {}), group_of[p], values)
        except NotServedError as reason:
            refused.append((p, str(reason)))
            continue
        members.setdefault(key, []).append(p)
        kinds[key] = kind
    if members and _overlap(params, optimizer):
        return [], [(p, "parameters or their state share memory") for p in params]
    for key, tensors in members.items():
        dtypes, counts, numbers = kinds[key]
        states = [optimizer.state[p] for p in tensors]
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
    if p.dtype not in DTYPES or grad.dtype not in DTYPES or not is_dense(p):
        raise NotServedError(f"a parameter is {p.dtype}, or not dense in memory")
    dtypes = {"param": p.dtype, "grad": grad.dtype}
    counts: dict[str, Any] = {}
    numbers: list[tuple[str, Any]] = []
    for name, value in state.items():
        if isinstance(value, bool | int | float | None):
            numbers.append((name, value))
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
    key = (group, tuple(dtypes.items()), values, tuple(numbers))
    return key, (dtypes, counts, tuple(name for name, _ in numbers))


def _overlap(params: Sequence[Tensor], optimizer: Optimizer) -> bool:
    """Whether two tensors that a step writes, in a bucket or not, share memory."""
    states = (
        v
        for p in params
        for v in optimizer.state.get(p, {}).values()
        if isinstance(v, Tensor) and v.dim() > 0
    )
    spans = sorted(filter(None, map(_span, chain(params, states))))
    return any(end > start for (_, end), (start, _) in pairwise(spans))


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """From where to where a tensor's elements lie; None if it has no memory of its own."""
    if tensor.layout != torch.strided or type(tensor) not in (Tensor, torch.nn.Parameter):
        return None
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous() or not tensor.numel():
        return start, start + tensor.numel() * size
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size
