"""A step like the last one, as one call of native code.

Most steps are: the same parameters, state and operations, other gradients and numbers. Python then
finds the numbers, and ``compileclip_step`` (``native_step_source.py``) does the rest: it sees that
nothing else has changed, gathers the gradients' addresses, copies those that have moved, launches
the norm and the updates, and counts steps and versions. Where anything is not as it was it does
nothing, and the step goes the way of ``multi_tensor_step.py``.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

import torch
from torch import Tensor

from compileclip.eager.eager_step import Scaler
from compileclip.lowering import threads
from compileclip.multi_tensor.native_step_arguments import COUNTED, Last, Native, native_step
from compileclip.native import cuda_driver
from compileclip.native.native_tensors import has_library, library
from compileclip.recording.shadow import ChangedError
from compileclip.settings import ClipSettings

MANY = 512  # parameters worth another thread, as in native_step_source.py


class SteadyStep:
    """The steps after one that was like them.

    Attributes:
        settings: of the last.
    """

    def __init__(self, last: Last, native: Native) -> None:
        self.settings = last.settings
        self._last, self._native = last, native
        self._optimizer, self._library = last.optimizer, library()
        self._given = last.scaler.grad_scale is not None, last.scaler.found_inf is not None
        self._is_scaled = any(self._given)
        self._dtype, self._device = last.total.dtype, last.total.device
        self._driver = native.driver
        self._stream = 0 if self._driver is None else self._driver.stream()
        most = max(len(work.bucket.params) for work in last.works)
        self._is_parallel = self._driver is None or most >= MANY

    def run(self, settings: ClipSettings, scaler: Scaler | None) -> Tensor | None:
        """Step.

        Args:
            settings: of this step.
            scaler: what a ``GradScaler`` says of it, if there is one.

        Returns:
            The total norm; None, and nothing was done, where this step is another.

        Raises:
            DriverError: the device's driver refuses; then a part may have been done.
        """
        if settings is not self.settings and not self._takes(settings):
            return None
        total = torch.empty((), dtype=self._dtype, device=self._device)
        scale, verdict = self._asked(scaler, total) if scaler or self._is_scaled else (total, total)
        if scale is None or type(total) is not Tensor:  # in a mode that fakes tensors
            return None
        native, groups, found = self._native, self._optimizer.param_groups, []
        try:
            for numbers in native.numbers:
                scalars, counts = numbers.formula.find(groups[numbers.group], numbers.values)
                found.append((numbers, array("d", counts), counts))
                native.floats[numbers.scalars] = array("d", scalars)
                native.floats[numbers.counts] = found[-1][1]
        except (ChangedError, IndexError, TypeError, OverflowError):  # of no float64
            return None
        stream = 0 if self._driver is None else self._driver.stream()
        if stream != self._stream:
            self._follow(stream)
        known = self._library
        tensors = (total, scale, verdict)
        where = (
            groups,
            self._optimizer.state,
            *tensors,
            stream,
            threads() if self._is_parallel else 1,
        )
        try:
            outcome = known.step(known.torch, native.address, *where)
        except SystemError:  # no list any more, or no dictionary
            return None
        if outcome:
            cuda_driver.check(min(outcome, 0), "launch a step, which may be done in part")
            return None
        for numbers, written, counts in found:
            numbers.values.update(zip(numbers.formula.names, counts, strict=True))
            native.floats[numbers.before] = written
        return total

    def _takes(self, settings: ClipSettings) -> bool:
        """Whether these are settings of which nothing is another but the bound."""
        bounds = settings.max_norm, self.settings.max_norm
        if None in bounds or replace(settings, max_norm=bounds[1]) != self.settings:
            return False
        self.settings = settings
        return True

    def _asked(self, scaler: Scaler | None, total: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Where native code finds what ``scaler`` says; None where it does not."""
        scale, verdict = (scaler.grad_scale, scaler.found_inf) if scaler else (None, None)
        if (scale is not None, verdict is not None) != self._given:
            return None, None
        for each in (scale, verdict):
            if each is not None and (each.device != total.device or each.dtype != torch.float32):
                return None, None
        return total if scale is None else scale, total if verdict is None else verdict

    def _follow(self, stream: int) -> None:
        """Keep what is freed from use by others as long as ``stream`` may read it."""
        current = torch.cuda.current_stream(self._device)
        for tensor in self._native.tensors:
            tensor.record_stream(current)
        self._stream = stream


def steady_step(last: Last, captured: bool) -> SteadyStep | None:
    """That of steps like ``last``, which was just taken; None where there is none.

    Args:
        last: the step.
        captured: whether CUDA graphs write addresses to where kernels find them, too.
    """
    if not has_library() or not library().knows_versions or not _may_be(last):
        return None
    native = native_step(last, captured)
    return None if native is None else SteadyStep(last, native)


def _may_be(last: Last) -> bool:
    """Whether steps like ``last`` ask for nothing but numbers."""
    buckets = [work.bucket for work in last.works]
    counts = [c.dtype for b in buckets if not b.stays for c in b.counts.values()]
    scaled = last.scaler.grad_scale is not None or last.scaler.found_inf is not None
    waits = last.works[0].place.target.waits
    return (
        not last.plan.refused
        and len({work.place for work in last.works}) == 1
        and all(work.formula is not None for work in last.works)
        and not any(bucket.numbers or bucket.is_mirrored for bucket in buckets)
        and COUNTED.keys() >= set(counts)
        and not (scaled if waits else last.settings.nonfinite == "raise")
    )
