"""What stays the same from step to step, and what is gathered anew in each."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets import StaleError, chunks, pointers, sort
from compileclip.eager import is_torchs_own

_GRAD = operator.attrgetter("grad")
_NBYTES = operator.attrgetter("nbytes")


@dataclass
class Gathered:
    """The tensors of one step.

    Attributes:
        grads: the gradients of all served parameters.
        grad_pointers: their addresses, of the copies where there are some.
        tables: for each bucket, the addresses of its operands' tensors by the operand's name.
        copies: pairs of a gradient and its copy in its parameter's layout, where they differ. The
            copies must outlive the use of the pointers.
    """

    grads: list[Tensor]
    grad_pointers: array[int]
    tables: list[dict[str, array[int]]]
    copies: list[tuple[Tensor, Tensor]]


class Plan:
    """The parameters of an optimizer that have gradients, in buckets.

    Attributes:
        params: those parameters, in the order of the norm, each once.
        served: those of them that are in buckets.
        refused: those that are not, each with the reason.
        buckets: the buckets.
        sizes: the elements of each served parameter.
        first_chunk: the number of chunks before each, and in all.
        dtypes: of the gradients.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.buckets, self.refused = sort(optimizer, params)
        if self.refused and not is_torchs_own(optimizer):
            self.buckets = []  # the step of another class must not be split
        without = {p for p, _ in self.refused} if self.buckets else set(params)
        self.served = [p for p in params if p not in without]
        for bucket in self.buckets:
            bucket.find(self.served)
        self.sizes, self.first_chunk = chunks(self.served)
        self.dtypes = {p.grad.dtype for p in self.served if p.grad is not None}
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._idle = [p for group in self._groups for p in group if p.grad is None]
        self._without = list(without)
        self._states = list(optimizer.state.values())
        self._pointers = pointers(self.served)
        self._nbytes = [p.grad.nbytes for p in self.served if p.grad is not None]
        self._strides = list(map(Tensor.stride, self.served))
        self._contiguous = all(map(Tensor.is_contiguous, self.served))

    def gather(self) -> Gathered:
        """The tensors of this step.

        Raises:
            StaleError: parameters, gradients or state are not what they were; make a new plan.
        """
        self._check()
        try:
            grads = list(map(_GRAD, self.served))
            addresses = pointers(grads)
            alike = all(map(Tensor.is_contiguous, grads)) and self._contiguous
            fits = list(map(_NBYTES, grads)) == self._nbytes
        except (AttributeError, RuntimeError, TypeError):  # None, or no memory of its own
            raise StaleError from None
        if not fits:
            raise StaleError
        copies = [] if alike else self._in_layout(grads, addresses)
        tables = [
            {
                "param": bucket.pick(self._pointers),
                "grad": bucket.pick(addresses),
                **bucket.state_pointers(),
            }
            for bucket in self.buckets
        ]
        return Gathered(grads, addresses, tables, copies)

    def _check(self) -> None:
        groups, states = self._optimizer.param_groups, self._optimizer.state
        if len(groups) != len(self._groups) or len(states) != len(self._states):
            raise StaleError
        for group, before in zip(groups, self._groups, strict=True):
            if not _same(group["params"], before):
                raise StaleError
        same = _same(list(states.values()), self._states)
        if not same or any(g is not None for g in map(_GRAD, self._idle)):
            raise StaleError
        if any(g is None for g in map(_GRAD, self._without)):
            raise StaleError
        if pointers(self.served) != self._pointers:
            raise StaleError
        if self._contiguous and all(map(Tensor.is_contiguous, self.served)):
            return
        if list(map(Tensor.stride, self.served)) != self._strides:
            raise StaleError

    def _in_layout(self, grads: list[Tensor], addresses: array[int]) -> list[tuple[Tensor, Tensor]]:
        """Copy gradients that are not laid out as their parameter, and put in those addresses."""
        copies = []
        for i, (p, grad, stride) in enumerate(zip(self.served, grads, self._strides, strict=True)):
            if grad.stride() != stride:
                copied = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
                copies.append((grad, copied))
                addresses[i] = copied.data_ptr()
        return copies


def _same(now: Sequence[object], before: Sequence[object]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))
