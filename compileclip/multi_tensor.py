"""Mode ``multi_tensor``: one norm and one kernel per bucket, however many parameters there are.

A step: gather pointers, take the norm, learn each bucket's scalars from its shadow
(``capture.py``), run each bucket's kernel, set the step counts. Nothing is compiled anew because a
hyperparameter changed; a step that does other operations (RAdam's sixth) is another program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import shadow, traced
from compileclip.assemble import assemble
from compileclip.buckets import StaleError
from compileclip.capture import Recording
from compileclip.functional import get_total_norm
from compileclip.lowering import UnsupportedError, targets
from compileclip.lowering.native import CompilerError
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.plan import Copied, Plan
from compileclip.self_check import check
from compileclip.settings import ClipSettings
from compileclip.shadow import NotPointwiseError
from compileclip.traced import CannotCompileError
from compileclip.work import Work, restore, tensors

OTHER_MODES = 'take mode="inductor" or mode="eager"'


@dataclass
class _Launch:
    """A kernel and its scalars in this step."""

    work: Work
    kernel: Any
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
        self._kernels: dict[Any, Any] = {}
        self._target: targets.Target = targets.Cpu()
        self._plan: Plan | None = None
        self._works: list[Work] = []
        self._uploaded: list[Any] = []  # the tables of this step
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
        copies = None if self._target.is_capturing() else self._gather()
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
        self._for_now = self._why_not_now(settings, {p.device for p in params})
        self._for_now = self._for_now or shadow.why_not(self._optimizer)
        if self._for_now is not None:
            return None
        if settings.write_grads and len({id(p.grad) for p in params}) < len(params):
            self._for_now = "two parameters have one gradient, which is to be written"
            return None
        traced.initialize_state(self._optimizer, with_grad=True, capturable=False)
        try:
            self._set_target(params[0].device)
            self._plan = Plan(self._optimizer, params)
        except (UnsupportedError, CompilerError) as reason:
            self._refuse(reason)
            return None
        self._works = [
            Work(self._optimizer, table, self._target.extent(table.bucket.sizes))
            for table in self._plan.tables
        ]
        return self._gather()

    def _why_not_now(self, settings: ClipSettings, devices: set[torch.device]) -> str | None:
        if devices == {torch.device("cpu")}:
            return None
        if len(devices) > 1:
            return "parameters lie on several devices"
        if settings.mode == "auto" or any(d.type != "cuda" for d in devices):
            return "parameters lie on another device than the CPU"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, which would repeat this step's scalars"
        if settings.nonfinite == "skip":
            return 'nonfinite="skip" is decided on the device'
        if any(group.get("capturable") for group in self._optimizer.param_groups):
            return "capturable=True keeps what depends on the step on the device"
        return None

    def _set_target(self, device: torch.device) -> None:
        if self._target.device != device:
            self._target = targets.of(device)
            self._max_norm, self._filled = self._max_norm.to(device), None
            self._kernels = {}

    def total_norm(self, copies: Sequence[Copied], norm_type: float) -> Tensor:
        """The norm of all gradients, those of parameters that are not served included."""
        plan = self._plan
        assert plan is not None
        self._uploaded = [self._target.upload(table.addresses) for table in plan.tables]
        if not plan.refused and not copies:
            extents = [work.extent for work in self._works]
            norm = self._target.total_norm(plan, self._uploaded, extents, norm_type)
            if norm is not None:
                return norm
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
        saved = [dict(work.bucket.values) for work in self._works]
        launches = []
        try:
            for work, before in zip(self._works, saved, strict=True):
                launches.append(self._prepare(work, before, insert, norm))
            self._extend()
        except BaseException:
            for work, before in zip(self._works, saved, strict=True):
                restore(work.bucket.leader, before)
            raise
        # Last in the norm, first in the update: what was read last is still in the cache.
        read = {"max_norm": self._max_norm, "norm": norm}
        for launch, table in reversed(list(zip(launches, self._uploaded, strict=True))):
            self._target.launch(launch.kernel, table, launch.work.extent, launch.scalars, read)
        if insert.write_grads:
            for each in copies:
                each.grad.copy_(each.copy)
        for work in self._works:
            work.bucket.advance(work.state)
            self._optimizer.param_groups[work.bucket.group].update(work.changes)

    def _extend(self) -> None:
        """Allocate the state that this step makes, all of it or none."""
        tables = [work.table for work in self._works]
        news = [set(work.state) - work.bucket.known for work in self._works]
        for i, (work, new) in enumerate(zip(self._works, news, strict=True)):
            if not new:
                continue
            made = {k: v for k, v in work.state.items() if k in new}
            self._plan = None  # there is more state now
            try:
                work.table = work.table.extended(work.bucket.extended(made))
                self._uploaded[i] = self._target.upload(work.table.addresses)
            except BaseException:
                for other, table, names in zip(self._works, tables, news, strict=True):
                    other.table = table
                    for state in table.bucket.states:
                        for name in names:
                            state.pop(name, None)
                raise

    def _prepare(
        self, work: Work, before: dict[str, Any], insert: InsertNormAndScale, norm: Tensor
    ) -> _Launch:
        """Learn the scalars of this step, and find its kernel."""
        scalars = work.scalars(before)
        recording = work.recording
        key = (id(recording), insert.clip, norm.dtype)
        if key not in work.kernels:
            kernel = self._kernel(work, recording, insert, norm.dtype)
            self._check(work, kernel, scalars, before, norm)
            work.kernels[key] = kernel
        return _Launch(work, work.kernels[key], scalars)

    def _kernel(
        self, work: Work, recording: Recording, insert: InsertNormAndScale, dtype: torch.dtype
    ) -> Any:
        made = [k for k in recording.after if k not in work.bucket.dtypes]
        dtypes = work.bucket.dtypes | {k: work.state[k].dtype for k in made}
        key = (tuple(recording.calls), tuple(recording.after.items()), tuple(dtypes.items()))
        if (key, insert, dtype) not in self._kernels:
            program = assemble(recording, dtypes, dtype, insert)
            self._kernels[key, insert, dtype] = self._target.kernel(program)
            self.compilations += 1
        return self._kernels[key, insert, dtype]

    def _check(
        self, work: Work, kernel: Any, scalars: list[float], before: dict[str, Any], norm: Tensor
    ) -> None:
        others = tensors(work.bucket.leader, before)
        read = {"max_norm": self._max_norm, "norm": norm}
        args = (self._optimizer, work.bucket, self._target, kernel, scalars, others, read)
        try:
            check(*args)
        except NotPointwiseError:
            raise
        except Exception as error:
            raise UnsupportedError(f"a kernel's first run failed: {error}") from error
