"""The total norm of a step in mode ``multi_tensor``, which its first kernel may be left to end."""

from __future__ import annotations

import torch
from torch import Tensor

from compileclip.eager import Scaler
from compileclip.lowering.targets import Ended, Norm


class StepNorm:
    """A norm, and the factor of a ``GradScaler`` that may still have to be taken out of it."""

    def __init__(self, norm: Norm, scaler: Scaler) -> None:
        self._norm, self._scale = norm, scaler.grad_scale

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

    def on(self, device: torch.device) -> Norm:
        """As a launch on ``device`` takes it, whose kernel ends it and takes the factor out."""
        if device != self.total.device or isinstance(self._norm, Ended):
            return Ended(self.value().to(device))
        self._scale = None
        return self._norm
