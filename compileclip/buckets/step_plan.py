"""What stays the same from step to step, and what is gathered anew in each."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import StaleError
from compileclip.buckets.grouping import sort
from compileclip.buckets.pointers import Table, surroundings
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.lowering.cpp.cpp_norm import first_chunks
from compileclip.recording.optimizer_attributes import marks


@dataclass
class Copied:
    """A gradient that is not laid out as its parameter, and its copy that is."""

    grad: Tensor
    copy: Tensor


class Plan:
    """The parameters of an optimizer that have gradients, in buckets.

    Attributes:
        params: those parameters, in the order of the norm, each once.
        refused: those of them that are in no bucket, each with the reason.
        tables: of each bucket, the addresses of its tensors.
        grads: the addresses of the gradients of all that are served, in the order of the norm.
        sizes: the elements of each served parameter.
        first_chunk: the number of chunks before each, and in all.
        dtypes: of the gradients.
        surroundings: the optimizer as it was sorted.

    Raises:
        UnsupportedError: as ``Table``.
        CompilerError: likewise.
    """

    def __init__(
        self, optimizer: Optimizer, params: Sequence[Tensor], stays: Collection[int] = ()
    ) -> None:
        """Sort ``params``, which have gradients.

        Args:
            optimizer: whose parameters they are.
            params: the parameters.
            stays: the parameter groups whose step counts are to stay on the device.
        """
        self.params = list(params)
        buckets, self.refused = sort(optimizer, params, stays)
        self._is_foreign = not is_torchs_own(optimizer)
        if self.refused and self._is_foreign:
            buckets = []  # the step of another class must not be split
        self._marks = marks(self.params) if self._is_foreign else []
        self._not_served = self._kinds_not_served()
        without = {p for p, _ in self.refused} if buckets else set(params)
        served = [p for p in params if p not in without]
        self.sizes = array("q", map(Tensor.numel, served))
        self.first_chunk = first_chunks(self.sizes)
        self.grads = array("Q", bytes(8 * len(served)))
        self.dtypes = {p.grad.dtype for p in served if p.grad is not None}
        nbytes = [p.grad.nbytes for p in served if p.grad is not None]
        self._nbytes = torch.tensor(nbytes, dtype=torch.int64, device="cpu")
        place = {p: i for i, p in enumerate(served)}
        self.tables = [Table(b, [place[p] for p in b.params], self.grads) for b in buckets]
        self.surroundings = surroundings(optimizer, without)

    def gather(self) -> list[Copied]:
        """Look up the addresses of this step.

        Returns:
            Copies, which must outlive the use of the addresses.

        Raises:
            StaleError: parameters, gradients or state are not what they were; make a new plan.
        """
        if not self.surroundings.are_unchanged():
            raise StaleError
        if self._is_foreign and marks(self.params) != self._marks:
            raise StaleError
        if self.refused and self._kinds_not_served() != self._not_served:
            raise StaleError  # they may be served now
        copies = []
        for table in self.tables:
            if not table.bucket.is_unchanged():
                raise StaleError
            if not table.gather():
                copies += _in_layout(table)
        return copies

    def _kinds_not_served(self) -> list[object]:
        """What the gradients of ``refused`` are."""
        grads = [p.grad for p, _ in self.refused]
        return [None if g is None else (type(g), g.layout, g.dtype) for g in grads]

    def may_write_grads(self) -> bool:
        """Whether no two gradients share memory, where all are laid out as their parameters."""
        starts = torch.frombuffer(self.grads, dtype=torch.int64)
        order, ends = starts.argsort(), starts + self._nbytes
        return bool((ends[order][:-1] <= starts[order][1:]).all())


def staying(optimizer: Optimizer, decides: bool) -> set[int]:
    """The parameter groups, by index, whose step counts are to stay on the device.

    They can where a step can run with ``capturable=True``. They are to where it does, where the
    device ``decides`` that a step does not count, and where the optimizer's own step would leave
    numbers there: step counts of fused kernels, a learning rate that is a tensor. (ASGD keeps its
    counts there too, but asks for them at each step.)
    """
    return {
        i
        for i, group in enumerate(optimizer.param_groups)
        if "capturable" in group and (group["capturable"] or decides or _is_there(optimizer, group))
    }


def _is_there(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    params = group["params"] if group.get("fused") else ()
    states = (optimizer.state.get(p, {}) for p in params)
    numbers = (v for held in (group, *states) for v in held.values() if isinstance(v, Tensor))
    return any(v.dim() == 0 and v.device.type != "cpu" for v in numbers)


def _in_layout(table: Table) -> list[Copied]:
    """Copy gradients that are not laid out as their parameter, and put in those addresses."""
    copies = []
    for i, p in enumerate(table.bucket.params):
        grad = p.grad
        if grad is not None and grad.stride() != p.stride():
            copied = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
            copies.append(Copied(grad, copied))
            table.set_grad(i, copied.data_ptr())
    return copies
