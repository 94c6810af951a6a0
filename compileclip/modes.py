"""One step of a wrapped optimizer, in the mode that serves.

``"auto"`` takes ``multi_tensor`` where that serves, and eager for the rest. It never takes
``inductor``, which compiles for minutes where there are hundreds of parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from compileclip import eager
from compileclip.eager import Gradients
from compileclip.fallback import warn_fallback
from compileclip.settings import ClipSettings
from compileclip.traced import can_undo

if TYPE_CHECKING:
    from compileclip.inductor import CompiledStep
    from compileclip.multi_tensor import MultiTensorStep


class Modes:
    """What an optimizer steps with.

    Attributes:
        compiled: the step of mode ``inductor``, once it was asked for.
        kernels: the step of mode ``multi_tensor``, likewise.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.compiled: CompiledStep | None = None
        self.kernels: MultiTensorStep | None = None
        self._optimizer = optimizer

    def step(
        self, settings: ClipSettings, grads: Gradients, report: Callable[[Tensor], None]
    ) -> None:
        """Take the norm, clip and update.

        Args:
            settings: how.
            grads: the parameters that have gradients.
            report: is told the total norm, as soon as that is known.

        Raises:
            RuntimeError: ``nonfinite="raise"`` and the norm is not finite; nothing was changed.
        """
        scaled = grads.grad_scale is not None or grads.found_inf is not None
        if grads.params and not scaled and os.environ.get("COMPILECLIP_DISABLE") != "1":
            if settings.mode == "inductor" and self._inductor(settings, grads, report):
                return
            if settings.mode in ("auto", "multi_tensor"):
                self._multi_tensor(settings, grads, report)
                return
        norm = grads.total_norm(settings.norm_type)
        report(norm)
        eager.update(self._optimizer, settings, grads, norm)

    def taken(self, settings: ClipSettings, param: Tensor) -> str:
        """The mode that ``param`` is stepped with, as far as is known before the first step."""
        if settings.mode == "eager" or os.environ.get("COMPILECLIP_DISABLE") == "1":
            return "eager"
        if settings.mode == "inductor":
            refused = self.compiled is not None and self.compiled.refusal is not None
            return "eager" if refused else "inductor"
        if self.kernels is None:
            return "multi_tensor" if param.device.type == "cpu" else "eager"
        return "multi_tensor" if self.kernels.serves_one(param) else "eager"

    def why_eager(self, settings: ClipSettings) -> str | None:
        """Why not all parameters are stepped with in a faster mode, or None."""
        if settings.mode == "eager":
            return 'mode="eager" was asked for'
        if os.environ.get("COMPILECLIP_DISABLE") == "1":
            return "COMPILECLIP_DISABLE=1 is set"
        step = self.compiled if settings.mode == "inductor" else self.kernels
        return None if step is None or step.why_not is None else step.why_not[0]

    def _multi_tensor(
        self, settings: ClipSettings, grads: Gradients, report: Callable[[Tensor], None]
    ) -> None:
        if self.kernels is None:
            from compileclip.multi_tensor import MultiTensorStep

            self.kernels = MultiTensorStep(self._optimizer)
        norm = grads.total_norm(settings.norm_type)
        report(norm)
        if self.kernels.serves(settings, grads.params):
            if not eager.may_step(self._optimizer, settings, grads, norm):
                return
            settings = replace(settings, nonfinite="propagate")  # decided
            if settings.write_grads is True:
                eager.make_writable(grads.params)
            left = self.kernels.run(settings, grads.params, norm)
        else:
            left = grads.params
        if settings.mode == "multi_tensor" and left and self.kernels.why_not is not None:
            warn_fallback('mode="multi_tensor"', *self.kernels.why_not)
        if left:
            self._eager(settings, grads, left, norm)

    def _eager(
        self, settings: ClipSettings, grads: Gradients, params: Sequence[Tensor], norm: Tensor
    ) -> None:
        """Step in eager mode with ``params`` alone."""
        if len(params) == len(grads.params):
            eager.update(self._optimizer, settings, grads, norm)
            return
        stepped = set(grads.params) - set(params)
        kept = [(p, p.grad) for p in stepped]
        try:
            for p in stepped:
                p.grad = None
            eager.update(self._optimizer, settings, Gradients(list(params)), norm)
        finally:
            for p, grad in kept:
                p.grad = grad

    def _inductor(
        self, settings: ClipSettings, grads: Gradients, report: Callable[[Tensor], None]
    ) -> bool:
        """Clip and update in one graph; False where that cannot be and nothing has changed."""
        if self.compiled is None:
            from compileclip.inductor import CompiledStep  # it loads the compiler

            self.compiled = CompiledStep(self._optimizer)
        norm = None
        in_graph = settings.nonfinite == "skip" and can_undo(self._optimizer)
        if settings.nonfinite != "propagate" and not in_graph:
            norm = grads.total_norm(settings.norm_type)
            report(norm)
            if not eager.may_step(self._optimizer, settings, grads, norm):
                return True
        if settings.write_grads is True:
            eager.make_writable(grads.params)
        norm = self.compiled.run(settings, grads.params, norm)
        if norm is not None:
            report(norm)
        return norm is not None
