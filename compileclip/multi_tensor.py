"""Mode ``multi_tensor``: one norm and one kernel per bucket, however many parameters there are.

A step: gather pointers, take the norm, learn each bucket's scalars from its shadow
(``capture.py``), run each bucket's kernel, set the step counts. Nothing is compiled anew because a
hyperparameter changed; a step that does other operations (RAdam's sixth) is another program.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import traced
from compileclip.assemble import assemble
from compileclip.buckets import Bucket, StaleError, sort
from compileclip.capture import (
    SHAPES,
    ChangedError,
    NotPointwiseError,
    Recording,
    Shadow,
    record,
    replay,
)
from compileclip.eager import is_torchs_own
from compileclip.lowering import UnsupportedError, cpp
from compileclip.lowering.native import CompilerError
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.self_check import check
from compileclip.settings import ClipSettings
from compileclip.traced import CannotCompileError

OTHER_MODES = 'take mode="inductor" or mode="eager"'


@dataclass
class _Work:
    """A bucket, what steps in its place, and what that has been seen to do, the latest last."""

    bucket: Bucket
    shadow: Shadow
    recordings: list[Recording] = field(default_factory=list)
    kernels: dict[Any, cpp.Kernel] = field(default_factory=dict)


@dataclass
class _Launch:
    """All that one step of a bucket needs besides pointers."""

    work: _Work
    kernel: cpp.Kernel
    scalars: list[float]


class MultiTensorStep:
    """The kernels of one optimizer.

    Attributes:
        compilations: how many programs were compiled.
        refusal: why no parameter is served (any more), or None.
        refused: parameters that are not served, each with the reason.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.compilations = 0
        self.refusal: CannotCompileError | None = None
        self.refused: list[tuple[Tensor, str]] = []
        self._optimizer = optimizer
        self._kernels: dict[Any, cpp.Kernel] = {}
        self._params: list[Tensor] = []
        self._state: object = None
        self._works: list[_Work] = []
        self._max_norm = torch.zeros((), dtype=torch.float64)
        self._for_now: str | None = None  # why the last step was not served, though others may be

    def serves(self, settings: ClipSettings, params: Sequence[Tensor]) -> bool:
        """Whether ``run`` may serve parameters, all of them or some."""
        self._for_now = None
        if not all(p.device.type == "cpu" for p in params):
            self._for_now = "parameters lie on another device than the CPU"
        elif settings.write_grads and len({id(p.grad) for p in params}) < len(params):
            self._for_now = "two parameters have one gradient, which is to be written"
        return self.refusal is None and self._for_now is None

    def serves_one(self, param: Tensor) -> bool:
        """Whether the last step served ``param``."""
        refused = any(param is p for p, _ in self.refused)
        return self.refusal is None and self._for_now is None and not refused

    @property
    def why_not(self) -> tuple[str, str] | None:
        """Why not all parameters are served, and what helps; None if they are."""
        if self.refusal is not None:
            return self.refusal.cause, self.refusal.remedy
        if self._for_now is not None:
            return self._for_now, OTHER_MODES
        if self.refused:
            return f"of {len(self.refused)} parameters: {self.refused[0][1]}", OTHER_MODES
        return None

    def run(self, settings: ClipSettings, params: Sequence[Tensor], norm: Tensor) -> list[Tensor]:
        """Clip and step.

        Args:
            settings: how to clip; what ``nonfinite`` says is done already.
            params: the parameters that have a gradient.
            norm: the total norm of all their gradients.

        Returns:
            The parameters that are left for another mode to step with; of them nothing has changed.
        """
        insert = InsertNormAndScale(
            settings.norm_type, settings.max_norm is not None, settings.write_grads is True
        )
        if settings.max_norm is not None:
            self._max_norm.fill_(settings.max_norm)
        try:
            self._sort(params)
            try:
                self._step(insert, norm)
            except StaleError:
                self._params = []
                self._sort(params)
                self._step(insert, norm)
        except (NotPointwiseError, UnsupportedError) as reason:
            self.refusal = CannotCompileError(str(reason), OTHER_MODES)
        except CompilerError as error:
            self.refusal = CannotCompileError(error.cause, error.remedy)
        if self.refusal is not None or not self._works:
            return list(params)
        return [p for p, _ in self.refused]

    def _sort(self, params: Sequence[Tensor]) -> None:
        same = len(params) == len(self._params) and self._state is self._optimizer.state
        if same and all(p is q for p, q in zip(params, self._params, strict=True)):
            return
        traced.initialize_state(self._optimizer, with_grad=True)
        buckets, self.refused = sort(self._optimizer, params)
        if self.refused and not is_torchs_own(self._optimizer):
            buckets = []  # the step of another class must not be split
        self._works = [_Work(b, Shadow(self._optimizer, b.dtypes)) for b in buckets]
        self._params, self._state = list(params), self._optimizer.state

    def _step(self, insert: InsertNormAndScale, norm: Tensor) -> None:
        gathered = [self._pointers(work.bucket) for work in self._works]
        saved = [_copies(work.bucket.leader) for work in self._works]
        launches = []
        try:
            for work, before in zip(self._works, saved, strict=True):
                launches.append(self._prepare(work, before, insert, norm))
        except BaseException:
            for work, before in zip(self._works, saved, strict=True):
                _restore(work.bucket.leader, before)
            raise
        # Last in the norm, first in the update: what was read last is still in the cache.
        for launch, (pointers, copies) in reversed(list(zip(launches, gathered, strict=True))):
            work = launch.work
            made = {k: v for k, v in work.shadow.state.items() if k not in work.bucket.known}
            if made:
                work.bucket = work.bucket.extended(made)
                pointers, copies = self._pointers(work.bucket)
                self._params = []  # sort anew: there is state now
            self._launch(launch, pointers, norm)
            if insert.write_grads:
                for grad, written in copies:
                    grad.copy_(written)
        for work in self._works:
            work.bucket.advance(work.shadow.state)
            self._optimizer.param_groups[work.bucket.group].update(work.shadow.changes)

    def _prepare(
        self, work: _Work, before: dict[str, Any], insert: InsertNormAndScale, norm: Tensor
    ) -> _Launch:
        """Learn the scalars of this step, and find its kernel."""
        bucket, shadow = work.bucket, work.shadow
        group = self._optimizer.param_groups[bucket.group]
        try:
            if not work.recordings:
                raise ChangedError
            recording = work.recordings[-1]
            scalars = replay(shadow, recording, group, bucket.leader)
        except ChangedError:
            _restore(bucket.leader, before)
            recording = record(shadow, group, bucket.leader)
            scalars = recording.scalars
            self._remember(work, recording, before)
            recording = work.recordings[-1]
        key = (id(recording), insert, norm.dtype)
        if key not in work.kernels:
            kernel = work.kernels[key] = self._kernel(work, recording, insert, norm.dtype)
            check(self._optimizer, bucket, kernel, scalars, before, self._max_norm, norm)
        return _Launch(work, work.kernels[key], scalars)

    def _remember(self, work: _Work, recording: Recording, before: dict[str, Any]) -> None:
        """Put ``recording`` last among those of ``work``, as the known one if it is not new."""
        for known in work.recordings:
            if (known.calls, known.after) == (recording.calls, recording.after):
                work.recordings.remove(known)
                work.recordings.append(known)
                return
        group = self._optimizer.param_groups[work.bucket.group]
        other = record(
            Shadow(self._optimizer, work.bucket.dtypes, SHAPES[1]), group, _copies(before)
        )
        if other.calls != recording.calls or other.scalars != recording.scalars:
            raise NotPointwiseError("the step depends on a parameter's shape")
        work.recordings.append(recording)

    def _kernel(
        self, work: _Work, recording: Recording, insert: InsertNormAndScale, dtype: torch.dtype
    ) -> cpp.Kernel:
        made = [k for k in recording.after if k not in work.bucket.dtypes]
        dtypes = work.bucket.dtypes | {k: work.shadow.state[k].dtype for k in made}
        key = (tuple(recording.calls), tuple(recording.after.items()), tuple(dtypes.items()))
        if (key, insert, dtype) not in self._kernels:
            program = assemble(recording, dtypes, dtype, insert)
            self._kernels[key, insert, dtype] = cpp.Kernel(program)
            self.compilations += 1
        return self._kernels[key, insert, dtype]

    def _pointers(self, bucket: Bucket) -> tuple[list[array[int]], list[Any]]:
        grads: list[Any] = [p.grad for p in bucket.params]
        return bucket.operands(grads, self._optimizer.state)

    def _launch(self, launch: _Launch, pointers: list[array[int]], norm: Tensor) -> None:
        bucket = launch.work.bucket
        values = {"max_norm": self._max_norm.data_ptr(), "norm": norm.data_ptr()}
        launch.kernel(
            pointers,
            bucket.sizes,
            bucket.first_chunk,
            launch.scalars,
            [values[node.name] for node in launch.kernel.program.values],
            torch.get_num_threads(),
        )


def _copies(others: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in others.items()}


def _restore(leader: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, Tensor):
            leader[name].copy_(value)
