"""Mode ``multi_tensor``: one norm and one kernel per bucket, however many parameters there are.

A step: gather pointers, take the norm, learn each bucket's scalars from its shadow
(``capture.py``), run each bucket's kernel, set the step counts. Nothing is compiled anew because a
hyperparameter changed; a step that does other operations (RAdam's sixth) is another program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import traced
from compileclip.assemble import assemble
from compileclip.buckets import Bucket, StaleError
from compileclip.capture import ChangedError, Recording, record, replay
from compileclip.functional import get_total_norm
from compileclip.gather import Table
from compileclip.lowering import UnsupportedError, cpp, norm
from compileclip.lowering.native import CompilerError
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.plan import Copied, Plan
from compileclip.rehearsal import Rehearsal
from compileclip.self_check import check
from compileclip.settings import ClipSettings
from compileclip.shadow import SHAPES, NotPointwiseError, Shadow
from compileclip.traced import CannotCompileError

OTHER_MODES = 'take mode="inductor" or mode="eager"'


@dataclass
class _Work:
    """A bucket, what steps in its place, and what that has been seen to do, the latest last.

    ``rehearsal`` is of the latest recording, if that can be rehearsed.
    """

    table: Table
    shadow: Shadow
    recordings: list[Recording] = field(default_factory=list)
    rehearsal: Rehearsal | None = None
    kernels: dict[Any, cpp.Kernel] = field(default_factory=dict)

    @property
    def bucket(self) -> Bucket:
        return self.table.bucket


@dataclass
class _Launch:
    """A kernel and its scalars in this step."""

    work: _Work
    kernel: cpp.Kernel
    scalars: list[float]


class MultiTensorStep:
    """The kernels of one optimizer.

    Attributes:
        compilations: how many programs were compiled.
        refusal: why no parameter is served (any more), or None.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.compilations = 0
        self.refusal: CannotCompileError | None = None
        self._optimizer = optimizer
        self._kernels: dict[Any, cpp.Kernel] = {}
        self._plan: Plan | None = None
        self._works: list[_Work] = []
        self._max_norm = torch.zeros((), dtype=torch.float64, device="cpu")
        self._filled: float | None = None  # what is in it
        self._insert: InsertNormAndScale | None = None
        self._for_now: str | None = None  # why the last step was not served, though others may be

    @property
    def refused(self) -> list[tuple[Tensor, str]]:
        """Parameters that are not served, each with the reason."""
        return [] if self._plan is None else self._plan.refused

    def serves_one(self, param: Tensor) -> bool:
        """Whether the last step served ``param``."""
        served = self.refusal is None and self._for_now is None and self._plan is not None
        return served and not any(param is p for p, _ in self.refused)

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

    def gather(self, settings: ClipSettings) -> list[Copied] | None:
        """Look up the tensors of this step; None unless they are what they were in the last."""
        copies = self._gather()
        if copies is not None and settings.write_grads:
            assert self._plan is not None
            addresses = [a for a in self._plan.grads if a]
            if copies or len(set(addresses)) < len(addresses):
                return None  # these cannot be written without a closer look
        return copies

    def _gather(self) -> list[Copied] | None:
        if self._plan is None or self.refusal is not None or not self._plan.tables:
            return None
        try:
            return self._plan.gather()
        except StaleError:
            self._plan = None
            return None

    def plan(self, settings: ClipSettings, params: Sequence[Tensor]) -> list[Copied] | None:
        """Sort ``params``, which have gradients, anew, and look up; None if none is served."""
        self._plan, self._for_now = None, None
        if self.refusal is not None:
            return None
        if not all(p.device.type == "cpu" for p in params):
            self._for_now = "parameters lie on another device than the CPU"
            return None
        if settings.write_grads and len({id(p.grad) for p in params}) < len(params):
            self._for_now = "two parameters have one gradient, which is to be written"
            return None
        traced.initialize_state(self._optimizer, with_grad=True)
        try:
            self._plan = Plan(self._optimizer, params)
        except (UnsupportedError, CompilerError) as reason:
            self._refuse(reason)
            return None
        self._works = [
            _Work(t, Shadow(self._optimizer, t.bucket.dtypes)) for t in self._plan.tables
        ]
        return self._gather()

    def total_norm(self, copies: Sequence[Copied], norm_type: float) -> Tensor:
        """The norm of all gradients, those of parameters that are not served included."""
        plan = self._plan
        assert plan is not None
        # With the addresses at hand, as get_total_norm takes it, to the bit.
        alike = len(plan.dtypes) == 1 and not plan.refused and not copies
        if alike and plan.dtypes <= norm.SERVED.get(norm_type, set()):
            (dtype,) = plan.dtypes
            wide = torch.promote_types(dtype, torch.float32)
            out = torch.empty((), dtype=wide, device="cpu")  # not on a default device
            args = (plan.grads, plan.sizes, plan.first_chunk, dtype, norm_type)
            if norm.norm_into(out, *args, torch.get_num_threads()):
                return out
        return get_total_norm([p.grad for p in plan.params if p.grad is not None], norm_type)

    def run(self, settings: ClipSettings, copies: Sequence[Copied], norm: Tensor) -> list[Tensor]:
        """Clip and step.

        Args:
            settings: how to clip; what ``nonfinite`` says is done already.
            copies: what ``gather`` or ``plan`` returned.
            norm: the total norm of all gradients.

        Returns:
            The parameters that are left for another mode to step with; of them nothing has changed.
        """
        assert self._plan is not None
        plan = self._plan
        insert = self._pass(settings)
        if settings.max_norm is not None and settings.max_norm != self._filled:
            self._max_norm.fill_(settings.max_norm)
            self._filled = settings.max_norm
        try:
            self._step(insert, copies, norm)
        except (NotPointwiseError, UnsupportedError, CompilerError) as reason:
            self._refuse(reason)
            return plan.params
        return [p for p, _ in plan.refused]

    def _pass(self, settings: ClipSettings) -> InsertNormAndScale:
        clip = settings.max_norm is not None
        if self._insert is None or self._insert.clip != clip:  # the rest of settings never changes
            write = settings.write_grads is True
            self._insert = InsertNormAndScale(settings.norm_type, clip, write)
        return self._insert

    def _refuse(self, reason: NotPointwiseError | UnsupportedError | CompilerError) -> None:
        if isinstance(reason, CompilerError):
            self.refusal = CannotCompileError(reason.cause, reason.remedy)
        else:
            self.refusal = CannotCompileError(str(reason), OTHER_MODES)

    def _step(self, insert: InsertNormAndScale, copies: Sequence[Copied], norm: Tensor) -> None:
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
        for launch in reversed(launches):
            work = launch.work
            made = {k: v for k, v in work.shadow.state.items() if k not in work.bucket.known}
            if made:
                work.table = work.table.extended(work.bucket.extended(made))
                self._plan = None  # there is more state now
            self._launch(launch, norm)
        if insert.write_grads:
            for copied in copies:
                copied.grad.copy_(copied.copy)
        for work in self._works:
            work.bucket.advance(work.shadow.state)
            self._optimizer.param_groups[work.bucket.group].update(work.shadow.changes)

    def _prepare(
        self, work: _Work, before: dict[str, Any], insert: InsertNormAndScale, norm: Tensor
    ) -> _Launch:
        """Learn the scalars of this step, and find its kernel."""
        scalars = self._scalars(work, before)
        recording = work.recordings[-1]
        key = (id(recording), insert.clip, norm.dtype)
        if key not in work.kernels:
            kernel = self._kernel(work, recording, insert, norm.dtype)
            check(self._optimizer, work.bucket, kernel, scalars, before, self._max_norm, norm)
            work.kernels[key] = kernel
        return _Launch(work, work.kernels[key], scalars)

    def _scalars(self, work: _Work, before: dict[str, Any]) -> list[float]:
        """Those of this step, in the quickest way; the latest recording is then what it does."""
        shadow, leader = work.shadow, work.bucket.leader
        group = self._optimizer.param_groups[work.bucket.group]
        if work.rehearsal is not None:
            try:
                return work.rehearsal.run(group, leader)
            except ChangedError:
                _restore(leader, before)
        if work.recordings:
            try:
                return replay(shadow, work.recordings[-1], group, leader)
            except ChangedError:
                _restore(leader, before)
        recording = record(shadow, group, leader)
        self._remember(work, recording, before)
        work.rehearsal = _rehearsal(work, group, before)
        return recording.scalars

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

    def _launch(self, launch: _Launch, norm: Tensor) -> None:
        bucket = launch.work.bucket
        values = {"max_norm": self._max_norm.data_ptr(), "norm": norm.data_ptr()}
        launch.kernel(
            launch.work.table.addresses,
            bucket.sizes,
            bucket.first_chunk,
            launch.scalars,
            [values[name] for name in launch.kernel.values],
            torch.get_num_threads(),
        )


def _rehearsal(
    work: _Work, group: Mapping[str, Any], before: Mapping[str, Any]
) -> Rehearsal | None:
    """That of the latest recording, if it finds the same scalars."""
    shadow = Shadow(work.shadow.optimizer, work.bucket.dtypes)
    recording = record(shadow, group, _copies(before))
    rehearsal = Rehearsal(shadow, recording)
    try:
        same = rehearsal.run(group, _copies(before)) == recording.scalars
    except ChangedError:
        return None
    return Rehearsal(work.shadow, work.recordings[-1]) if same else None


def _copies(others: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in others.items()}


def _restore(leader: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(value, Tensor):
            leader[name].copy_(value)
