"""Mode ``multi_tensor``: one norm and one kernel per bucket, however many parameters there are.

A step: gather pointers, take the norm, learn each bucket's scalars from its shadow
(``recorder.py``), run each bucket's kernel, set the step counts. Nothing is compiled anew because a
hyperparameter changed; a step that does other operations (RAdam's sixth) is another program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import StaleError
from compileclip.buckets.bucket_step import BucketStep, extend, restore_all, scalars_of
from compileclip.buckets.step_plan import Copied, Plan, staying
from compileclip.custom_optimizers import checks, side_effects
from compileclip.eager.eager_step import Scaler
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.fallback import CannotCompileError
from compileclip.lowering import targets
from compileclip.multi_tensor import eligibility
from compileclip.multi_tensor.fresh_state import FreshState
from compileclip.multi_tensor.kernel_cache import DeviceKernels
from compileclip.multi_tensor.kernel_kinds import Kinds, counts
from compileclip.multi_tensor.launching import keep, kernels_of, launch
from compileclip.multi_tensor.native_step import SteadyStep, steady_step
from compileclip.multi_tensor.native_step_arguments import Last
from compileclip.multi_tensor.plan_backoff import PlanBackoff
from compileclip.multi_tensor.step_norm import StepNorm
from compileclip.settings import ClipSettings


class MultiTensorStep:
    """The kernels of one optimizer.

    Attributes:
        refusal: why no parameter is served (any more), or None.
        steady: takes the next step if that is like the last, or None.
    """

    def __init__(self, optimizer: Optimizer, repeats: bool = True) -> None:
        """``repeats``: whether native code may take the norm, and so a whole step."""
        self.refusal: CannotCompileError | None = None
        self.steady: SteadyStep | None = None
        self._optimizer, self._repeats = optimizer, repeats
        self._places: dict[torch.device, DeviceKernels] = {}
        self._plan: Plan | None = None
        self._works: list[BucketStep] = []
        self._for_decisions = False  # whether the plan lets the device decide
        self._filled: float | None = None  # the bound that kernels find
        self._kinds = Kinds()
        self._is_foreign = not is_torchs_own(optimizer)
        self._scalars = checks.scalars if self._is_foreign else scalars_of
        self._backoff = PlanBackoff()
        self._fresh = FreshState(optimizer)
        self._captured: list[object] = []  # what CUDA graphs read at each replay
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
        cause = self._for_now or eligibility.of_some(self.refused)
        return (cause, eligibility.OTHER_MODES) if cause else None

    @property
    def decides(self) -> bool:
        """Whether kernels find out by themselves that a step does not count; as of the last."""
        return not self._waits and all(work.decides for work in self._works)

    @property
    def sets_state(self) -> bool:
        """Whether the last step has left other objects as state than were there."""
        return self._plan is None or any(work.bucket.numbers for work in self._works)

    @property
    def _waits(self) -> bool:
        """Whether the host is to wait for a device, as of the last plan."""
        return not self._works or any(work.place.target.waits for work in self._works)

    @property
    def _is_capturing(self) -> bool:
        return any(place.target.is_capturing() for place in self._places.values())

    def gather(self, settings: ClipSettings, scaler: Scaler) -> list[Copied] | None:
        """Look up the tensors of this step; None unless they are what they were in the last."""
        self.steady = None
        if self._is_capturing and self._why_not_captured(settings) is not None:
            return None
        if not (self._for_decisions or self._waits) and eligibility.may_decide(settings, scaler):
            return None
        copies = self._gather()
        if copies is not None and settings.write_grads:
            assert self._plan is not None
            if copies or not self._plan.may_write_grads():
                return None  # these cannot be written without a closer look
        return copies

    def _gather(self) -> list[Copied] | None:
        if self._plan is None or self.refusal is not None:
            return None
        try:
            copies = self._plan.gather()
        except StaleError:
            self._plan = None
            return None
        if not self._plan.tables:  # nothing is served, nor would another plan serve more
            return None
        for work in self._works:
            read = work.place.target.refresh(work.resident, work.table)
            if read is not None:
                self._captured.append(read)
        return copies

    def plan(
        self, settings: ClipSettings, params: Sequence[Tensor], scaler: Scaler
    ) -> list[Copied] | None:
        """Sort ``params``, which have gradients, anew, and look up; None if none is served."""
        capturing = self._is_capturing
        self._for_now = self._why_not_captured(settings) if capturing else None
        if self.refusal is not None or self._for_now is not None or self._serves_nothing():
            return None
        self._plan = None
        self._for_now = eligibility.why_not_planned(self._optimizer, settings, params)
        if self._for_now is None and settings.mode == "auto" and not self._backoff.may_plan():
            self._for_now = "gradients, parameters or state are others from step to step"
        if self._for_now is not None:
            return None
        self._fresh.make(params)
        try:
            self._make_plan(params, eligibility.may_decide(settings, scaler))
        except Exception as error:
            self._forget_fresh()
            self.refusal = eligibility.refusal(error)
            return None
        copies = self._gather()
        if copies is None:
            self._fresh.forget()
        return copies

    def _serves_nothing(self) -> bool:
        """Whether the plan is still that of the last step, and serves no parameter."""
        if self._plan is None or self._plan.tables:
            return False
        self._gather()  # which forgets a plan that is not
        return self._plan is not None

    def _make_plan(self, params: Sequence[Tensor], decides: bool) -> None:
        if self._is_foreign:
            side_effects.check(self._optimizer)
        for device in {p.device for p in params} - self._places.keys():
            self._places[device] = DeviceKernels(self._optimizer, targets.of(device))
            self._filled = None
        waits = any(self._places[p.device].target.waits for p in params)
        self._for_decisions = decides
        stays = set() if waits else staying(self._optimizer, decides)
        self._plan = plan = Plan(self._optimizer, params, stays)
        eligibility.check_plan(self._optimizer, plan, decides and not waits, self._is_foreign)
        self._works = [
            BucketStep(self._optimizer, table, self._places[table.bucket.params[0].device])
            for table in plan.tables
        ]

    def _forget_fresh(self) -> None:
        """Take back the state that was made for a step that does not count."""
        if self._fresh.forget():
            self._plan = None

    def _why_not_captured(self, settings: ClipSettings) -> str | None:
        return eligibility.why_not_captured(settings, self._plan, self._works, self._filled)

    @property
    def gathered(self) -> tuple[Plan, Sequence[BucketStep]]:
        """The plan whose tensors were looked up, and its buckets, for the norm."""
        assert self._plan is not None
        return self._plan, self._works

    def grads(self) -> list[Tensor | None]:
        """Gradients that other threads must not free by putting others in their place meanwhile."""
        if self._plan is None or not self._waits:
            return []  # a device's memory is not used for anything else before
        return [p.grad for p in self._plan.params]

    def run(
        self,
        settings: ClipSettings,
        copies: Sequence[Copied],
        norm: StepNorm,
        scaler: Scaler,
        step_others: Callable[[list[Tensor]], None],
    ) -> bool:
        """Clip and step, or leave everything as it is.

        Args:
            settings: how to clip.
            copies: what ``gather`` or ``plan`` returned.
            norm: the total norm of all gradients, which is ended here.
            scaler: what a ``GradScaler`` says of them.
            step_others: steps with the parameters that are not served, and does so first: it may
                raise, as torch does of sparse gradients, and then nothing must have changed.

        Returns:
            Whether that was done; if not, nothing has changed, and another mode is to step.

        Raises:
            RuntimeError: the norm is not finite and ``nonfinite="raise"``; nothing was changed.
        """
        self.set_bound(settings.max_norm)
        try:
            self._step(settings, copies, norm, scaler, step_others)
        except eligibility.REASONS as reason:
            if self._is_capturing:
                self._for_now = str(reason)
            else:
                self.refusal = eligibility.refusal(reason)
            return False
        finally:
            norm.value()  # where nothing was launched
        return True

    def step_again(self, settings: ClipSettings, scaler: Scaler | None) -> Tensor | None:
        """Step as in the last step; the norm, or None where nothing was done: it may be another."""
        if self.steady is None:
            return None
        if settings.max_norm != self._filled:
            self.set_bound(settings.max_norm)
        norm = self.steady.run(settings, scaler)
        self._backoff.steps += norm is not None
        return norm

    def set_bound(self, max_norm: float | None) -> None:
        """Have kernels clip to ``max_norm``, those of a CUDA graph too; nothing waits."""
        if max_norm not in (None, self._filled) and not self._is_capturing:
            for place in self._places.values():
                place.max_norm.fill_(max_norm)
            self._filled = max_norm

    def _step(
        self,
        settings: ClipSettings,
        copies: Sequence[Copied],
        norm: StepNorm,
        scaler: Scaler,
        step_others: Callable[[list[Tensor]], None],
    ) -> None:
        """Step, if the step counts."""
        assert self._plan is not None
        refused = [p for p, _ in self._plan.refused]
        saved = [dict(work.bucket.values) for work in self._works]
        try:
            scalars = self._scalars(self._optimizer, self._works, saved)
            decides = self.decides and not self.refused and settings.nonfinite != "raise"
            kind = self._kinds.of(settings, norm.total.dtype, scaler, decides)
            stepped = counts(settings, kind, norm, scaler)
            known = all(work.place.knows(work, kind) for work in self._works)
            if stepped:
                kernels = kernels_of(self._works, kind, scalars, saved, norm, scaler)
                if any(work.made for work in self._works):
                    self._plan = None  # there will be more state
                    extend(self._works)
                if refused:
                    step_others(refused)
        except BaseException:
            restore_all(self._works, saved)
            self._forget_fresh()
            raise
        if not stepped:
            restore_all(self._works, saved)
            self._forget_fresh()
            return
        if self._is_capturing:
            self._captured.append((self._plan, self._works, self._places))
        launches = launch(self._works, kernels, scalars, kind, norm, scaler)
        if kind.insert.write_grads:
            for each in copies:
                each.grad.copy_(each.copy)
        keep(self._optimizer, self._works)
        self._fresh.keep()
        self._backoff.steps += 1
        known = self._repeats and known and not copies and not self._is_capturing
        if known and self._plan is not None:
            places = self._plan, self._works, kernels
            last = Last(self._optimizer, settings, scaler, *places, norm, launches)
            self.steady = steady_step(last, captured=bool(self._captured))
