"""Optimizers whose class is not torch's: what must hold before programs take over their step.

torch's own steps treat each parameter by itself, by its group and its state alone. Another class
may ask for a parameter's shape, attributes or place, count what it has stepped, or look at other
groups. So before the first use of what a shadow did, it is done again in the place of each
parameter of another shape or with other attributes, and by as many tiny parameters at once as
there are real ones.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket_step import BucketStep, scalars_of, tensors
from compileclip.distributed.views import WHOLE_SHAPE
from compileclip.recording.optimizer_attributes import marks
from compileclip.recording.recorder import is_same, record
from compileclip.recording.shadow import NotPointwiseError, Shadow


def scalars(
    optimizer: Optimizer, works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]
) -> list[list[float]]:
    """As ``scalars_of``, and what the step does is checked where that is new.

    Raises:
        NotPointwiseError: the step is not that of each parameter by its numbers alone.
    """
    with _without_chance():
        found = scalars_of(optimizer, works, saved)
        if any(work.is_new for work in works):
            _check(optimizer, works, saved)
    return found


@contextmanager
def _without_chance() -> Iterator[None]:
    """Within it, nobody may draw a random number on the host; those drawn are put back.

    Raises:
        NotPointwiseError: somebody did.
    """
    before = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        same = random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
        if not same:
            random.setstate(before[0])
            torch.set_rng_state(before[1])
    if not same:
        raise NotPointwiseError("the step draws random numbers")


def _check(
    optimizer: Optimizer, works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]
) -> None:
    """See that the step is what the shadows of ``works`` have just done."""
    for work, before in zip(works, saved, strict=True):
        _check_each(optimizer, work, before)
    if not any(work.bucket.stays for work in works):
        _check_together(optimizer, works, saved)


def _check_each(optimizer: Optimizer, work: BucketStep, before: Mapping[str, Any]) -> None:
    """Step in the place of each parameter that differs in more than its numbers."""
    bucket = work.bucket
    pairs = zip(bucket.params, marks(bucket.params), strict=True)
    for p in {(_shape(p), *mark): p for p, mark in pairs}.values():
        shadow = work.make_shadow(_shape(p), p)
        group = optimizer.param_groups[bucket.group]
        found = record(shadow, group, tensors(bucket.leader, before))
        if not is_same(found, work.recording) or not _same_changes(shadow, work):
            raise NotPointwiseError(
                f"the step asks for more than the numbers of a parameter of shape {tuple(p.shape)}"
            )


def _shape(p: Tensor) -> tuple[int, ...]:
    """That which a step would ask for: of the whole, where ``p`` is one rank's part."""
    shape: tuple[int, ...] = getattr(p, WHOLE_SHAPE, tuple(p.shape))
    return shape


def _same_changes(shadow: Shadow, work: BucketStep) -> bool:
    return _equal(shadow.changes, work.changes) and _equal(shadow.elsewhere, work.elsewhere)


def _check_together(
    optimizer: Optimizer, works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]
) -> None:
    """Step a tiny parameter in the place of each, all at once."""
    alone = [_alone(optimizer, *pair) for pair in zip(works, saved, strict=True)]
    company = Company(optimizer, works, saved)
    company.step()
    for work, expected in zip(works, alone, strict=True):
        if not all(_equal(company.result(p), expected) for p in work.bucket.params):
            raise NotPointwiseError("the step depends on a parameter's place among others")
    changes = dict(works[0].elsewhere) | {work.bucket.group: work.changes for work in works}
    if not _equal(company.changes, {i: found for i, found in changes.items() if found}):
        raise NotPointwiseError("the step changes a parameter group with each parameter")


def _alone(optimizer: Optimizer, work: BucketStep, before: Mapping[str, Any]) -> list[Any]:
    shadow = work.make_shadow()
    group = optimizer.param_groups[work.bucket.group]
    shadow.step(group, tensors(work.bucket.leader, before))
    return [shadow.operands["param"].detach(), shadow.state]


class Company:
    """A tiny parameter for each of an optimizer's, with gradients where these have some.

    Attributes:
        changes: what the step changed in parameter groups, by their index.
    """

    def __init__(
        self, optimizer: Optimizer, works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]
    ) -> None:
        self._shadow = works[0].make_shadow()
        self._state: Any = defaultdict(dict)
        self._tiny: dict[Tensor, Tensor] = {}
        for work, before in zip(works, saved, strict=True):
            for p in work.bucket.params:
                operands = work.make_shadow().operands
                self._tiny[p] = tiny = operands.pop("param")
                del operands["grad"]
                state = operands | tensors(work.bucket.leader, before)
                if state:
                    self._state[tiny] = state
        self._groups = [
            {**group, "params": [self._of(p) for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        self.changes: dict[int, dict[str, Any]] = {}

    def _of(self, p: Tensor) -> Tensor:
        return self._tiny.setdefault(p, torch.nn.Parameter(torch.ones(2, 3, device="cpu")))

    def step(self) -> None:
        """Let the optimizer step them."""
        self.changes = self._shadow.step_all(self._groups, self._state)

    def result(self, p: Tensor) -> list[Any]:
        """What became of a parameter and its state."""
        tiny = self._tiny[p]
        return [tiny.detach(), dict(self._state[tiny])]


def _equal(a: Any, b: Any) -> bool:
    """Whether two values from steps are the same; NaN is NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor):
        numbers = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return numbers and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a is b or a == b or (a != a and b != b))
