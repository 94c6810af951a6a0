"""Mode ``multi_tensor``: one norm and one kernel per bucket, however many parameters there are.

A step: gather pointers, take the norm, learn each bucket's scalars from its shadow
(``capture.py``), run each bucket's kernel, set the step counts. Nothing is compiled anew because a
hyperparameter changed; a step that does other operations (RAdam's sixth) is another program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import eager, foreign, traced
from compileclip.assemble import Kind
from compileclip.buckets import StaleError
from compileclip.eager import Scaler
from compileclip.functional import get_total_norm
from compileclip.kernels import Kernels
from compileclip.lowering import UnsupportedError, targets
from compileclip.lowering.native import CompilerError
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.patience import Patience
from compileclip.plan import Copied, Plan, staying
from compileclip.serving import MOST_LOOKS, REASONS, why_not_captured, why_not_planned
from compileclip.settings import ClipSettings
from compileclip.shadow import failed
from compileclip.traced import CannotCompileError
from compileclip.work import Work, extend, restore, scalars_of

OTHER_MODES = 'take mode="inductor" or mode="eager"'


class MultiTensorStep:
    """The kernels of one optimizer.

    Attributes:
        refusal: why no parameter is served (any more), or None.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.refusal: CannotCompileError | None = None
        self._optimizer = optimizer
        self._target: targets.Target = targets.Cpu()
        self._kernels = Kernels(optimizer, self._target)
        self._plan: Plan | None = None
        self._works: list[Work] = []
        self._for_decisions = False  # whether the plan lets the device decide
        self._max_norm = torch.zeros((), dtype=torch.float64, device="cpu")
        self._filled: float | None = None  # what is in it
        self._insert: InsertNormAndScale | None = None
        self._is_foreign = not eager.is_torchs_own(optimizer)
        self._scalars = foreign.scalars if self._is_foreign else scalars_of
        self._patience = Patience()
        self._fresh: list[Tensor] = []  # whose state this step has made
        self._captured: list[object] = []  # what CUDA graphs read at each replay
        self._for_now: str | None = None  # why the last step was not served, though others may be

    @property
    def compilations(self) -> int:
        """How many programs were compiled."""
        return self._kernels.compilations

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

    @property
    def decides(self) -> bool:
        """Whether kernels find out by themselves that a step does not count; as of the last."""
        return not self._target.waits and all(work.decides for work in self._works)

    def gather(self, settings: ClipSettings, scaler: Scaler) -> list[Copied] | None:
        """Look up the tensors of this step; None unless they are what they were in the last."""
        if self._target.is_capturing() and self._why_not_captured(settings) is not None:
            return None
        if self._decides(settings, scaler) and not self._for_decisions:
            return None
        copies = self._gather()
        if copies is not None and settings.write_grads:
            assert self._plan is not None
            if copies or not self._plan.may_write_grads():
                return None  # these cannot be written without a closer look
        return copies

    def _decides(self, settings: ClipSettings, scaler: Scaler) -> bool:
        """Whether the device is to decide that a step does not count."""
        return not self._target.waits and (
            settings.nonfinite == "skip" or scaler.found_inf is not None
        )

    def _gather(self) -> list[Copied] | None:
        if self._plan is None or self.refusal is not None or not self._plan.tables:
            return None
        try:
            copies = self._plan.gather()
        except StaleError:
            self._plan = None
            return None
        for work in self._works:
            self._target.refresh(work.resident, work.table)
        return copies

    def plan(
        self, settings: ClipSettings, params: Sequence[Tensor], scaler: Scaler
    ) -> list[Copied] | None:
        """Sort ``params``, which have gradients, anew, and look up; None if none is served."""
        capturing = self._target.is_capturing()
        self._for_now = self._why_not_captured(settings) if capturing else None
        if self.refusal is not None or self._for_now is not None:
            return None
        self._plan = None
        self._for_now = why_not_planned(self._optimizer, settings, params)
        if self._for_now is None and settings.mode == "auto" and not self._patience.may_plan():
            self._for_now = "gradients, parameters or state are others from step to step"
        if self._for_now is not None:
            return None
        self._fresh = [p for p in params if not self._optimizer.state.get(p)]
        traced.initialize_state(self._optimizer, with_grad=True, capturable=False)
        try:
            self._make_plan(params, self._decides(settings, scaler))
        except Exception as error:
            self._forget_fresh()
            self._refuse(error if isinstance(error, REASONS) else failed(error))
            return None
        return self._gather()

    def _make_plan(self, params: Sequence[Tensor], decides: bool) -> None:
        self._set_target(params[0].device)
        self._for_decisions = decides
        stays = set() if self._target.waits else staying(self._optimizer, decides)
        self._plan = plan = Plan(self._optimizer, params, stays)
        looks = len(plan.tables) * len(self._optimizer.param_groups)
        if self._is_foreign and looks > MOST_LOOKS:
            raise UnsupportedError(f"there are {len(self._optimizer.param_groups)} groups")
        self._works = [Work(self._optimizer, table, self._target) for table in plan.tables]

    def _forget_fresh(self) -> None:
        """Take back the state that was made for a step that does not count."""
        for p in self._fresh:
            self._optimizer.state.pop(p, None)
        if self._fresh:
            self._plan = None
        self._fresh = []

    def _why_not_captured(self, settings: ClipSettings) -> str | None:
        return why_not_captured(settings, self._plan, self._works, self._filled)

    def _set_target(self, device: torch.device) -> None:
        if self._target.device != device:
            self._target = targets.of(device)
            self._max_norm, self._filled = self._max_norm.to(device), None
            self._kernels = Kernels(self._optimizer, self._target)

    def total_norm(self, copies: Sequence[Copied], norm_type: float) -> Tensor:
        """The norm of all gradients, those of parameters that are not served included."""
        plan = self._plan
        assert plan is not None
        if not plan.refused and not copies:
            norm = self._target.total_norm(plan, self._works, norm_type)
            if norm is not None:
                return norm
        for work in self._works:
            work.bucket.look()
        return get_total_norm([p.grad for p in plan.params if p.grad is not None], norm_type)

    def run(
        self, settings: ClipSettings, copies: Sequence[Copied], norm: Tensor, scaler: Scaler
    ) -> list[Tensor]:
        """Clip and step, or leave everything as it is.

        Args:
            settings: how to clip.
            copies: what ``gather`` or ``plan`` returned.
            norm: the total norm of all gradients.
            scaler: what a ``GradScaler`` says of them.

        Returns:
            The parameters that are left for another mode to step with; of them nothing has changed.

        Raises:
            RuntimeError: the norm is not finite and ``nonfinite="raise"``; nothing was changed.
        """
        assert self._plan is not None
        plan = self._plan
        self.set_bound(settings.max_norm)
        try:
            stepped = self._step(settings, copies, norm, scaler)
        except REASONS as reason:
            if self._target.is_capturing():
                self._for_now = str(reason)
            else:
                self._refuse(reason)
            return plan.params
        return [p for p, _ in plan.refused] if stepped else []

    def set_bound(self, max_norm: float | None) -> None:
        """Have kernels clip to ``max_norm``, those of a CUDA graph too; nothing waits."""
        if max_norm not in (None, self._filled) and not self._target.is_capturing():
            self._max_norm.fill_(max_norm)
            self._filled = max_norm

    def _pass(self, settings: ClipSettings) -> InsertNormAndScale:
        clip = settings.max_norm is not None
        if self._insert is None or self._insert.clip != clip:  # the rest of settings never changes
            write = settings.write_grads is True
            self._insert = InsertNormAndScale(settings.norm_type, clip, write)
        return self._insert

    def _refuse(self, reason: Exception) -> None:
        if isinstance(reason, CompilerError):
            self.refusal = CannotCompileError(reason.cause, reason.remedy)
        else:
            self.refusal = CannotCompileError(str(reason), OTHER_MODES)

    def _step(
        self, settings: ClipSettings, copies: Sequence[Copied], norm: Tensor, scaler: Scaler
    ) -> bool:
        """Step; False where the step does not count."""
        saved = [dict(work.bucket.values) for work in self._works]
        try:
            scalars = self._scalars(self._optimizer, self._works, saved)
            kind = self._kind(settings, norm, scaler)
            decided = kind.finite or kind.found_inf  # by the kernels
            stepped = decided or eager.counts(settings, scaler.found_inf, norm)
            if stepped:
                read = {"max_norm": self._max_norm, "norm": norm, **scaler.on(norm.device)}
                kernels = [
                    self._kernels.of(work, kind, found, before, read)
                    for work, found, before in zip(self._works, scalars, saved, strict=True)
                ]
                if any(work.made for work in self._works):
                    self._plan = None  # there will be more state
                    extend(self._works, self._target)
        except BaseException:
            self._restore(saved)
            self._forget_fresh()
            raise
        if not stepped:
            self._restore(saved)
            self._forget_fresh()
            return False
        if self._target.is_capturing():
            self._captured.append((self._plan, self._works, self._max_norm))
        # Last in the norm, first in the update: what was read last is still in the cache.
        for work, kernel, found in reversed(list(zip(self._works, kernels, scalars, strict=True))):
            args = (kernel, work.resident, work.extent, found, {**read, **work.values})
            self._target.launch(*args, work.bucket.counts)
            work.table.note_written(grads=kind.insert.write_grads)
        if kind.insert.write_grads:
            for each in copies:
                each.grad.copy_(each.copy)
        groups = self._optimizer.param_groups
        for index, changes in self._works[0].elsewhere.items():
            if all(work.bucket.group != index for work in self._works):  # these know by themselves
                groups[index].update(changes)
        for work in self._works:
            work.bucket.advance(work.state)
            groups[work.bucket.group].update(work.changes)
        self._fresh = []
        self._patience.note_step()
        return True

    def _restore(self, saved: Sequence[dict[str, Any]]) -> None:
        for work, before in zip(self._works, saved, strict=True):
            restore(work.bucket.leader, before)

    def _kind(self, settings: ClipSettings, norm: Tensor, scaler: Scaler) -> Kind:
        decides = self.decides and not self.refused and settings.nonfinite != "raise"
        return Kind(
            self._pass(settings),
            norm.dtype,
            scaler.grad_scale is not None,
            decides and scaler.found_inf is not None,
            decides and settings.nonfinite == "skip",
        )
