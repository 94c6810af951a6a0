"""Noticing that gradients have been clipped before the step, which then measures the clipped."""

from __future__ import annotations

import warnings
from collections import deque

from torch import Tensor

STEPS = 20  # as long as it is looked for
ALIKE = 3  # so many norms in a row
CLOSE = 1e-5  # relative: clip_grad_norm_ adds 1e-6 to the norm by which it divides


class ClippedBefore:
    """The norms of an optimizer's first steps.

    Clipped gradients have one norm, in step after step: the bound of whatever clipped them. Other
    gradients do not, unless they are the same ones.
    """

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=ALIKE)
        self._left = STEPS

    def over(self, norm: Tensor | None, max_norm: float | None) -> bool:
        """Look at the norm of one more step, and warn; True once there is no more to be seen.

        Only a CPU's norm can be read without waiting for it, so others are not looked at.
        """
        if norm is None:
            return False
        if norm.device.type != "cpu" or type(norm) is not Tensor:
            return True
        self._left -= 1
        self._norms.append(float(norm))
        if not self._look_clipped(max_norm):
            return self._left == 0
        warnings.warn(
            f"gradients come to the step with a total norm of {self._norms[-1]:.4g}, time after "
            "time: something clips them before, as a trainer does by its max_grad_norm or "
            "gradient_clip_val. Parameters are right, but total_norm is the norm after that clip, "
            "and each step pays for both. Turn the other one off; docs/trainers.md says where",
            UserWarning,
            stacklevel=4,
        )
        return True

    def _look_clipped(self, max_norm: float | None) -> bool:
        low, high = min(self._norms), max(self._norms)
        if len(self._norms) < ALIKE or not 0 < high < float("inf") or high - low > CLOSE * high:
            return False
        # The same gradients time after time, as in a benchmark, have the same norm to the bit.
        return low < high or (max_norm is not None and abs(high - max_norm) <= CLOSE * high)
