"""One step of a wrapped optimizer, in the mode that serves.

``"auto"`` takes ``multi_tensor`` where that serves, and eager for the rest. It never takes
``inductor``, which compiles for minutes where there are hundreds of parameters.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager import eager_step
from compileclip.eager.eager_step import Gradients, Scaler
from compileclip.eager.norm_over_ranks import are_parts
from compileclip.eager.optimizer_state import can_undo
from compileclip.fallback import warn_fallback
from compileclip.lowering import is_disabled, why_no_kernels
from compileclip.settings import ClipSettings
from compileclip.step_over_ranks import StepOverRanks
from compileclip.validation import check_parameter

if TYPE_CHECKING:
    from compileclip.buckets.step_plan import Copied
    from compileclip.graph.inductor_mode import CompiledStep
    from compileclip.multi_tensor.multi_tensor_step import MultiTensorStep


_alive: weakref.WeakSet[Modes] = weakref.WeakSet()


def _unlock() -> None:
    """In a forked process no other thread goes on with a step."""
    for modes in list(_alive):
        modes.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class Modes:
    """What an optimizer steps with.

    Attributes:
        compiled: the step of mode ``inductor``, once it was asked for.
        kernels: the step of mode ``multi_tensor``, likewise.
        over_ranks: the step where ranks hold parts of the parameters, once that was so.
        lock: held during a step, in which other threads may run.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.compiled: CompiledStep | None = None
        self.kernels: MultiTensorStep | None = None
        self.over_ranks: StepOverRanks | None = None
        self._optimizer = optimizer
        self._checked = False  # the parameters
        self.lock = threading.RLock()
        _alive.add(self)

    def step(
        self,
        settings: ClipSettings,
        scaler: Scaler,
        report: Callable[[Tensor], None],
    ) -> None:
        """Take the norm, clip and update.

        Args:
            settings: how.
            scaler: what a ``GradScaler`` says of the step.
            report: is told the total norm, as soon as that is known.

        Raises:
            RuntimeError: ``nonfinite="raise"`` and the norm is not finite, or a gradient lies on
                another device than its parameter; nothing was changed.
        """
        if self.over_ranks is not None:
            self._step_over_ranks(self.over_ranks, settings, scaler, report)
            return
        kernels = settings.mode in ("auto", "multi_tensor") and not is_disabled()
        if kernels and self._again(settings, scaler, report):
            return
        if are_parts(self._optimizer, settings):
            self.over_ranks = StepOverRanks(self._optimizer)
            self._step_over_ranks(self.over_ranks, settings, scaler, report)
            return
        params = eager_step.params_with_grad(self._optimizer)
        if not self._checked:  # a parameter may have become one rank's part after it was wrapped
            for p in params if settings.process_group is None else ():
                check_parameter(p)
            self._checked = True
        grads = Gradients(scaler.grad_scale, scaler.found_inf, params)
        if params and kernels:
            self._multi_tensor(settings, grads, report)
            return
        if params and settings.mode == "inductor" and not is_disabled():
            bare = scaler.grad_scale is None and scaler.found_inf is None
            if bare and self._inductor(settings, grads, report):
                return
        norm = grads.total_norm(settings.norm_type)
        report(norm)
        eager_step.update(self._optimizer, settings, grads, norm)

    def _step_over_ranks(
        self,
        over_ranks: StepOverRanks,
        settings: ClipSettings,
        scaler: Scaler,
        report: Callable[[Tensor], None],
    ) -> None:
        try:
            over_ranks.step(settings, scaler, report)
        finally:
            self.kernels, self.compiled = over_ranks.kernels, over_ranks.compiled

    def set_bound(self, max_norm: float | None) -> None:
        """Let it be known at once, for a CUDA graph is replayed without a call of ``step``."""
        if self.kernels is not None:
            self.kernels.set_bound(max_norm)

    def taken(self, settings: ClipSettings, param: Tensor) -> str:
        """The mode that ``param`` is stepped with, as far as is known before the first step."""
        if settings.mode == "eager" or is_disabled():
            return "eager"
        if settings.mode == "inductor":
            refused = self.compiled is not None and self.compiled.refusal is not None
            return "eager" if refused else "inductor"
        if self.kernels is None:
            return "eager" if why_no_kernels(param.device) else "multi_tensor"
        param = param if self.over_ranks is None else self.over_ranks.ranks.local.view(param)
        return "multi_tensor" if self.kernels.serves_one(param) else "eager"

    @property
    def wait_for_the_norm(self) -> bool:
        """Whether the host decides that a step does not count, as far as is known."""
        if self.kernels is not None and self.kernels.why_not is None:
            return not self.kernels.decides
        return not eager_step.takes_grad_scale(self._optimizer)

    def why_eager(self, settings: ClipSettings) -> str | None:
        """Why not all parameters are stepped with in a faster mode, or None."""
        if settings.mode == "eager":
            return 'mode="eager" was asked for'
        if is_disabled():
            return "COMPILECLIP_DISABLE=1 is set"
        if settings.mode != "inductor" and self.kernels is None:
            params = (p for group in self._optimizer.param_groups for p in group["params"])
            devices = dict.fromkeys(p.device for p in params)
            return next(filter(None, map(why_no_kernels, devices)), None)
        step = self.compiled if settings.mode == "inductor" else self.kernels
        return None if step is None or step.why_not is None else step.why_not[0]

    def _again(
        self, settings: ClipSettings, scaler: Scaler, report: Callable[[Tensor], None]
    ) -> bool:
        """Step as in the last step; False if anything but numbers has changed since."""
        copies = None if self.kernels is None else self.kernels.gather(settings, scaler)
        if copies is None:
            return False
        self._run(settings, copies, scaler, report)
        return True

    def _multi_tensor(
        self, settings: ClipSettings, grads: Gradients, report: Callable[[Tensor], None]
    ) -> None:
        if self.kernels is None:
            from compileclip.multi_tensor.multi_tensor_step import MultiTensorStep

            self.kernels = MultiTensorStep(self._optimizer)
        if settings.write_grads is True:
            eager_step.make_writable(grads.params)
        copies = self.kernels.plan(settings, grads.params, grads)
        if copies is not None:
            self._run(settings, copies, grads, report)
            return
        self._warn(settings)
        norm = grads.total_norm(settings.norm_type)
        report(norm)
        eager_step.update(self._optimizer, settings, grads, norm)

    def _run(
        self,
        settings: ClipSettings,
        copies: Sequence[Copied],
        scaler: Scaler,
        report: Callable[[Tensor], None],
    ) -> None:
        from compileclip.multi_tensor.step_norm import take_norm

        assert self.kernels is not None
        held = self.kernels.grads()
        norm = take_norm(*self.kernels.gathered, settings, copies, scaler)
        report(norm.total)

        def step_eagerly(params: list[Tensor], how: ClipSettings) -> None:
            self._warn(settings)
            grads = Gradients(scaler.grad_scale, scaler.found_inf, params)
            eager_step.update_among(self._optimizer, how, grads, norm.value())

        def step_others(params: list[Tensor]) -> None:
            from compileclip.buckets.grouping import overlap

            # Kernels read gradients afterwards, and one may be of two parameters.
            grads = [
                p.grad for p in eager_step.params_with_grad(self._optimizer) if p.grad is not None
            ]
            shared = settings.write_grads is None and overlap(grads)
            step_eagerly(params, replace(settings, write_grads=False) if shared else settings)

        # A norm of a class that has operations of its own may have no memory to read.
        is_plain = type(norm.total) is Tensor
        if not (is_plain and self.kernels.run(settings, copies, norm, scaler, step_others)):
            step_eagerly(eager_step.params_with_grad(self._optimizer), settings)
        del held

    def _warn(self, settings: ClipSettings) -> None:
        assert self.kernels is not None
        if settings.mode == "multi_tensor" and self.kernels.why_not is not None:
            warn_fallback('mode="multi_tensor"', *self.kernels.why_not)

    def _inductor(
        self, settings: ClipSettings, grads: Gradients, report: Callable[[Tensor], None]
    ) -> bool:
        """Clip and update in one graph; False where that cannot be and nothing has changed."""
        if self.compiled is None:
            from compileclip.graph.inductor_mode import CompiledStep  # it loads the compiler

            self.compiled = CompiledStep(self._optimizer)
        norm = None
        in_graph = settings.nonfinite == "skip" and can_undo(self._optimizer)
        if settings.nonfinite != "propagate" and not in_graph:
            norm = grads.total_norm(settings.norm_type)
            report(norm)
            if not eager_step.may_step(self._optimizer, settings, grads, norm):
                return True
        if settings.write_grads is True:
            eager_step.make_writable(grads.params)
        norm = self.compiled.run(settings, grads.params, norm)
        if norm is not None:
            report(norm)
        return norm is not None
