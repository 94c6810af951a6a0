"""What the kernels of a step are made for, and who decides whether the step counts."""

from __future__ import annotations

import torch

from compileclip.eager import eager_step
from compileclip.eager.eager_step import Scaler
from compileclip.multi_tensor.step_norm import StepNorm
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.recording.program_builder import Kind
from compileclip.settings import ClipSettings


class Kinds:
    """The kinds of an optimizer's steps."""

    def __init__(self) -> None:
        self._insert: InsertNormAndScale | None = None

    def of(self, settings: ClipSettings, norm: torch.dtype, scaler: Scaler, decides: bool) -> Kind:
        """That of a step.

        Args:
            settings: of the step.
            norm: the dtype of its total norm.
            scaler: what a ``GradScaler`` says of it.
            decides: whether kernels can find out by themselves that it does not count.
        """
        return Kind(
            self._pass(settings),
            norm,
            scaler.grad_scale is not None,
            decides and scaler.found_inf is not None,
            decides and settings.nonfinite == "skip",
        )

    def _pass(self, settings: ClipSettings) -> InsertNormAndScale:
        clip = settings.max_norm is not None
        if self._insert is None or self._insert.clip != clip:  # the rest of settings never changes
            write = settings.write_grads is True
            self._insert = InsertNormAndScale(settings.norm_type, clip, write)
        return self._insert


def counts(settings: ClipSettings, kind: Kind, norm: StepNorm, scaler: Scaler) -> bool:
    """Whether a step counts, as far as the host is to know.

    Raises:
        RuntimeError: as ``eager.counts``.
    """
    if kind.finite or kind.found_inf:  # the kernels decide
        return True
    if settings.nonfinite == "propagate" and scaler.found_inf is None:
        return True
    return eager_step.counts(settings, scaler.found_inf, norm.value())
