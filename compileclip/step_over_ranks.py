"""One step of an optimizer of which ranks hold parts.

The norm comes first, whatever this rank has to step, so that no rank waits for another in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager import eager_step, memory_layout
from compileclip.eager.eager_step import Gradients, Scaler
from compileclip.eager.norm_over_ranks import Ranks
from compileclip.eager.unhooked_step import is_elementwise
from compileclip.fallback import warn_fallback
from compileclip.lowering import is_disabled
from compileclip.settings import ClipSettings

if TYPE_CHECKING:
    from compileclip.buckets.step_plan import Copied
    from compileclip.graph.inductor_mode import CompiledStep
    from compileclip.multi_tensor.multi_tensor_step import MultiTensorStep


class StepOverRanks:
    """The steps of one optimizer.

    Attributes:
        ranks: what it has together with those of other ranks.
        kernels: the step of mode ``multi_tensor`` with this rank's parts, once it was asked for.
        compiled: that of mode ``inductor``, likewise.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.ranks = Ranks(optimizer)
        self.kernels: MultiTensorStep | None = None
        self.compiled: CompiledStep | None = None
        self._optimizer = optimizer

    def step(
        self, settings: ClipSettings, scaler: Scaler, report: Callable[[Tensor], None]
    ) -> None:
        """Take the norm over the ranks, clip and update; as ``Modes.step``.

        Raises:
            ValueError: ranks do not agree, or a gradient cannot be placed as its parameter; nothing
                was changed.
        """
        local = self.ranks.local
        with local.gradients(written=settings.write_grads is True):
            again, part = self._again(settings, scaler)
            norm = scaler.unscaled(self.ranks.total_norm(settings, part))
            report(norm)
            if self._with_parts(settings, scaler, norm, again):
                return
            local.forget()
            self._eagerly(eager_step.params_with_grad(self._optimizer), settings, scaler, norm)

    def _again(
        self, settings: ClipSettings, scaler: Scaler
    ) -> tuple[list[Copied] | None, Tensor | None]:
        """If kernels find all as in the last step, copies of gradients, and this rank's norm."""
        if self.kernels is None or settings.mode in ("eager", "inductor") or is_disabled():
            return None, None
        copies = self.kernels.gather(settings, scaler)
        if copies is None:
            return None, None
        from compileclip.multi_tensor.step_norm import norm_of_parts

        return copies, norm_of_parts(*self.kernels.gathered, copies, settings.norm_type)

    def _with_parts(
        self, settings: ClipSettings, scaler: Scaler, norm: Tensor, again: list[Copied] | None
    ) -> bool:
        """Step with the parts that this rank holds; False where that is not done."""
        if settings.mode == "eager" or is_disabled():
            return False
        if settings.mode == "inductor":
            return self._in_a_graph(settings, scaler, norm)
        return self._with_kernels(settings, scaler, norm, again)

    def _in_a_graph(self, settings: ClipSettings, scaler: Scaler, norm: Tensor) -> bool:
        """Mode ``inductor``, of which the norm is taken before."""
        from compileclip.graph.inductor_mode import CompiledStep

        local = self.ranks.local
        if self.compiled is None:
            self.compiled = CompiledStep(local.optimizer)
        views = eager_step.params_with_grad(local.optimizer)
        if not views or scaler.grad_scale is not None or scaler.found_inf is not None:
            return False
        if not is_elementwise(self._optimizer):
            kind = type(self._optimizer).__name__
            self.compiled.refuse(f"{kind} is not known to step each element by itself")
            return False
        grads = Gradients(params=views)
        if not eager_step.may_step(local.optimizer, settings, grads, norm):
            return True
        if self.compiled.run(settings, views, norm) is None:
            return False
        local.take_over(state=True)
        return True

    def _with_kernels(
        self, settings: ClipSettings, scaler: Scaler, norm: Tensor, copies: list[Copied] | None
    ) -> bool:
        """Mode ``multi_tensor``; without ``copies``, the parts are sorted anew."""
        from compileclip.lowering.target import Ended
        from compileclip.multi_tensor.multi_tensor_step import MultiTensorStep
        from compileclip.multi_tensor.step_norm import StepNorm

        local = self.ranks.local
        if self.kernels is None:
            self.kernels = MultiTensorStep(local.optimizer, repeats=False)
        planned = copies is None
        if planned:
            views = eager_step.params_with_grad(local.optimizer)
            copies = self.kernels.plan(settings, views, scaler) if views else None

        def step_others(views: list[Tensor]) -> None:
            self._warn(settings)
            local.leave(views)
            self._eagerly(list(map(local.whole, views)), settings, scaler, norm)

        given = StepNorm(Ended(norm), Scaler())  # from which the scale is taken out
        if copies is not None and self.kernels.run(settings, copies, given, scaler, step_others):
            local.take_over(state=planned or self.kernels.sets_state)
            return True
        self._warn(settings)
        return False

    def _eagerly(
        self, params: list[Tensor], settings: ClipSettings, scaler: Scaler, norm: Tensor
    ) -> None:
        """Step ``params`` alone, by torch's kernels."""
        grads = Gradients(scaler.grad_scale, scaler.found_inf, params)
        together = memory_layout.are_on_one_mesh(params)
        with nullcontext() if together else memory_layout.unfused(self._optimizer):
            eager_step.update_among(self._optimizer, settings, grads, norm)

    def _warn(self, settings: ClipSettings) -> None:
        if settings.mode == "multi_tensor" and self.kernels and self.kernels.why_not is not None:
            warn_fallback('mode="multi_tensor"', *self.kernels.why_not)
