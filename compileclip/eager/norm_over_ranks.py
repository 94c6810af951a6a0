"""The total norm of tensors of which each rank holds a part, by this rank's kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.distributed.local_optimizer import LocalOptimizer
from compileclip.distributed.shards import any_sharded, given_groups
from compileclip.eager import reference
from compileclip.eager.checks import check_layouts
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.settings import ClipSettings

if TYPE_CHECKING:
    from compileclip.distributed.total_norm import TotalNorm

_FLOAT64 = torch.zeros(0, dtype=torch.float64)
_NOTHING = torch.zeros(0)  # in the place of the parameters of a stage that has none
_layout = attrgetter("layout")
_float64_norm = functools.partial(reference.total_norm, dtype=torch.float64)


@torch._disable_dynamo  # type: ignore[attr-defined]  # its groups are no part of a graph
def norm_over_ranks(
    tensors: Sequence[Tensor],
    parts: Sequence[Tensor | None],
    norm_type: float,
    process_group: Any = None,
) -> Tensor:
    """The norm of ``tensors``, of which this rank has ``parts``, over their meshes and a group."""
    from compileclip.distributed.total_norm import TotalNorm

    groups = given_groups(process_group)
    if not tensors:
        tensors, parts = [_NOTHING], [None]
    total = TotalNorm(tensors, groups).of(
        _checked(parts, norm_type),
        norm_type,
        _float64_norm,
        # Other ranks of a group may hold float64 parameters.
        reference.overreaches([_FLOAT64] if groups else tensors, norm_type),
    )
    return total.to(reference.norm_dtype(tensors))


def _checked(parts: Sequence[Tensor | None], norm_type: float) -> Sequence[Tensor | None]:
    """``parts``, of which each is of a layout that has a norm."""
    here = [part for part in parts if part is not None]
    if set(map(_layout, here)) - {torch.strided}:
        check_layouts(here, norm_type)
    return parts


class Ranks:
    """What an optimizer's ranks have together: one norm of parameters of which each holds parts.

    Attributes:
        local: the optimizer of this rank's parts.
        plan: of the norm, once there was one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.local = LocalOptimizer(optimizer, marks=not is_torchs_own(optimizer))
        self.plan: TotalNorm | None = None
        self._planned: list[Tensor] = []
        self._dtype, self._overreaches = torch.float32, False
        self._agree = False

    def total_norm(self, settings: ClipSettings, part: Tensor | None = None) -> Tensor:
        """The norm of the optimizer's gradients; all ranks have to ask for it.

        Args:
            settings: its order, and how it is used.
            part: the norm of this rank's parts, float64, if it is known.

        Raises:
            ValueError: at first, where ranks do not agree on settings or parameters.
        """
        params = self.local.params or [_NOTHING]
        if self.plan is None or self._planned is not self.local.params:
            from compileclip.distributed.total_norm import TotalNorm

            self.plan = TotalNorm(params, settings.process_group)
            self._planned = self.local.params
            self._dtype = reference.norm_dtype(params)
            if not self._agree or not settings.process_group:
                self._overreaches = reference.overreaches(params, settings.norm_type)
        if not self._agree:
            from compileclip.distributed.agreement import check

            names = ("max_norm", "norm_type", "nonfinite")
            said = {name: getattr(settings, name) for name in names}
            self._overreaches = check(self.plan, params, said, self._overreaches)
            self._agree = True
        order = settings.norm_type
        if part is not None and len(self.plan.alike) == 1:
            return self.plan.of_parts([part], order, self._overreaches).to(self._dtype)
        parts = _checked(self.local.grads() or [None], order)
        return self.plan.of(parts, order, _float64_norm, self._overreaches).to(self._dtype)


def are_parts(optimizer: Optimizer, settings: ClipSettings) -> bool:
    """Whether ranks hold parts of the parameters of ``optimizer``."""
    groups = optimizer.param_groups
    return bool(settings.process_group) or any(any_sharded(group["params"]) for group in groups)
