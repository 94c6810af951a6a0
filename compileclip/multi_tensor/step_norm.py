"""The total norm of a step in mode ``multi_tensor``, which its first kernel may be left to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compileclip.buckets.bucket_step import BucketStep
from compileclip.buckets.step_plan import Copied, Plan
from compileclip.eager.eager_step import Scaler
from compileclip.eager.functional import get_total_norm
from compileclip.lowering.target import Ended, Norm
from compileclip.native.cuda_driver import Launch
from compileclip.settings import ClipSettings


class StepNorm:
    """A norm, and the factor of a ``GradScaler`` that may still have to be taken out of it.

    Attributes:
        launches: those before an update whose kernel ended it; none if no kernel did.
    """

    def __init__(self, norm: Norm, scaler: Scaler) -> None:
        self._norm, self._scale = norm, scaler.grad_scale
        self.launches: list[Launch] = []

    @property
    def total(self) -> Tensor:
        """Where the norm is, once all is done that this step launches."""
        return self._norm.total

    def value(self) -> Tensor:
        """The norm, ended now if it was not."""
        total = self._norm.end()
        if self._scale is not None:
            total.div_(self._scale.to(total.device))
            self._scale = None
        return total

    def on(self, device: torch.device, takes_scale: bool) -> Norm:
        """As a launch on ``device`` takes it, whose kernel ends it.

        Args:
            device: where it is launched.
            takes_scale: whether that kernel takes the factor out, as those do that read it.
        """
        left = self._scale is not None and not takes_scale
        if left or device != self.total.device or isinstance(self._norm, Ended):
            return Ended(self.value().to(device))
        self.launches = self.launches or self._norm.left_open
        return self._norm

    def note_launched(self) -> None:
        """What ``on`` returned was launched."""
        self._scale = None


def take_norm(
    plan: Plan,
    works: Sequence[BucketStep],
    settings: ClipSettings,
    copies: Sequence[Copied],
    scaler: Scaler,
) -> StepNorm:
    """The norm of all gradients of ``plan``.

    Args:
        plan: what is gathered.
        works: its buckets.
        settings: of the step.
        copies: gradients that were copied to be gathered.
        scaler: what a ``GradScaler`` says of them.
    """
    norm = _by_kernels(plan, works, copies, settings.norm_type)
    if norm is not None:
        return StepNorm(norm, scaler)
    grads = [p.grad for p in plan.params if p.grad is not None]
    return StepNorm(Ended(get_total_norm(grads, settings.norm_type)), scaler)


def norm_of_parts(
    plan: Plan, works: Sequence[BucketStep], copies: Sequence[Copied], norm_type: float
) -> Tensor | None:
    """The norm of what this rank has, in float64; None where no kernel takes all of it at once."""
    norm = _by_kernels(plan, works, copies, norm_type, torch.float64)
    return None if norm is None else norm.end()


def _by_kernels(
    plan: Plan,
    works: Sequence[BucketStep],
    copies: Sequence[Copied],
    norm_type: float,
    dtype: torch.dtype | None = None,
) -> Norm | None:
    places = {work.place.target for work in works}
    if plan.refused or copies or len(places) != 1:
        return None
    (target,) = places
    return target.total_norm(plan, works, norm_type, dtype)
