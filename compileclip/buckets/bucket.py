"""Buckets: parameters that one program serves with the same scalars."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


class StaleError(Exception):
    """Parameters, gradients or state are no longer what a bucket was made of."""


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
        versions: of ``counts``, each with the version that nobody has written since.
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
        self._share_counts()
        self.values: dict[str, Any] = {
            k: v.item() if isinstance(v, Tensor) else v for k, v in self.leader.items()
        }
        self._entries = len(self.states[0])
        self._share_numbers()

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
            if self.stays:
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
        self._share_numbers()
        self.versions = {k: (buffer, buffer._version) for k, buffer in self.counts.items()}

    def is_unchanged(self) -> bool:
        """Whether nobody has written to counts and numbers since the last step."""
        counts = all(buffer._version == version for buffer, version in self.versions.values())
        return counts and self._has_counts() and (not self.numbers or self._has_numbers())

    def _has_counts(self) -> bool:
        """Whether counts on a host are what they were: versions do not tell of all that writes."""
        if self.stays or self._on_host:
            return True  # a device would have to be waited for
        for name, buffer in self.counts.items():
            found = buffer.tolist()
            found = found if buffer.dim() else [found]
            if found.count(self.values[name]) != len(found):
                return False
        return True

    def _has_numbers(self) -> bool:
        """Whether each parameter has the same objects as numbers, and no further state."""
        given = [(name, self.values[name]) for name in self.numbers]
        return all(
            len(state) == self._entries and all(state.get(name) is value for name, value in given)
            for state in self.states
        )

    @property
    def is_mirrored(self) -> bool:
        """Whether a device keeps counts that the host keeps too."""
        return bool(self._on_host)

    @property
    def known(self) -> set[str]:
        """The names of the state."""
        return {*self.dtypes, *self.counts, *self.numbers}

    @property
    def leader(self) -> dict[str, Any]:
        """What a shadow needs of the state besides operands."""
        first = self.states[0]
        names = self.numbers if self.stays else (*self.counts, *self.numbers)
        return {name: first[name] for name in names} | self._on_host

    def _share_numbers(self) -> None:
        for name in self.numbers:
            for state in self.states:
                state[name] = self.values[name]

    def _share_counts(self) -> None:
        """Make the 0-dim tensors of each name views of one buffer, which one call fills."""
        for name in self.counts:
            first, count = self.states[0][name], len(self.states)
            place = self.params[0].device if self.stays else first.device
            in_place = first.device == place and (self.stays or not _is_shared(first, count))
            if in_place and _lie_in_a_row([state[name] for state in self.states]):
                # Left where they are: a captured step may count there.
                buffer = first if count == 1 else first.as_strided((count,), (1,))
            else:
                buffer = first.expand(count).clone().to(place)
                for state, view in zip(self.states, buffer.unbind(), strict=True):
                    state[name] = view
            self.counts[name] = buffer
            if not self.stays and buffer.device.type != "cpu":
                self._on_host[name] = first.cpu()
        self.versions = {k: (buffer, buffer._version) for k, buffer in self.counts.items()}


def _lie_in_a_row(tensors: Sequence[Tensor]) -> bool:
    """Whether 0-dim tensors are views of one buffer, one after the other.

    Those that were copied or loaded together share memory, too, but no version.
    """
    first = tensors[0]
    start, size, base = first.data_ptr(), first.element_size(), first._base
    return len(tensors) == 1 or all(
        t.data_ptr() == start + i * size and t._base is base is not None
        for i, t in enumerate(tensors)
    )


def _is_shared(tensor: Tensor, count: int) -> bool:
    """Whether a 0-dim tensor shares a version with more than ``count`` of its kind."""
    return tensor._base is not None and tensor._base.numel() > count
