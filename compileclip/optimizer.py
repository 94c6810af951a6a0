"""``wrap`` and ``ClippedOptimizer``: an optimizer whose step clips.

The way of the data in one step: gradients -> total norm -> clip coefficient -> the wrapped
optimizer's own update. The mode (``eager_step.py``) decides how the coefficient reaches the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import validation
from compileclip.delegate import Delegate, decides_on_overflows
from compileclip.distributed.shards import given_groups
from compileclip.double_clipping import ClippedBefore
from compileclip.eager.eager_step import Scaler
from compileclip.graph.backward_leaves import WITHOUT_GRADIENTS
from compileclip.graph.dynamo_stand_in import StandIn, have_gradients, stand_in
from compileclip.graph.traced_step import leave_out, traced_step
from compileclip.modes import Modes
from compileclip.settings import ClipSettings, Fixed
from compileclip.validation import BOUNDS
from compileclip.wrappable import check_optimizer


def wrap(
    optimizer: Optimizer,
    max_norm: float | None,
    *,
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    write_grads: bool | None = None,
    mode: str = "auto",
    process_group: Any = None,
) -> ClippedOptimizer:
    """Make ``optimizer.step()`` clip the total norm of all its gradients before it updates.

    ``opt = wrap(AdamW(...), max_norm=1.0)`` replaces ``clip_grad_norm_`` and ``optimizer.step()``
    by ``opt.step()``.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose step needs no closure. The wrapper shares its
            parameter groups, its state and its hooks; from here on, use the wrapper. Its step is
            its class's: what was put in its place on the object is not called.
        max_norm: the largest total norm that gradients keep. ``None`` clips nothing, and the norm
            is measured all the same. May be set anew at any time: ``opt.max_norm = 0.5``.
        norm_type: the order p of the norm, ``inf`` included.
        nonfinite: what a NaN or infinite norm does. ``"propagate"``: what torch does, the gradients
            are scaled by it. ``"raise"``: ``RuntimeError``, and nothing has changed; each step
            waits for the device. ``"skip"``: parameters, state and step counts stay as they were,
            decided on the device where the optimizer runs fused (``fused=True``), in mode
            ``"multi_tensor"`` where its class knows ``capturable`` or counts nothing, and in
            compiled steps of torch's optimizers, else by waiting for the norm. A ``GradScaler``
            then calls the step on an overflow too, as it does for fused optimizers.
        write_grads: ``True``: ``p.grad`` holds the clipped gradient after the step. ``False``:
            ``p.grad`` is left untouched; the step then runs on scaled copies, at most 64 MiB (or
            one gradient) at a time for torch's optimizers, and all gradients at once for another
            class, whose step must not be split. ``None``: whichever is cheaper, so do not read
            ``p.grad`` after the step.
        mode: ``"multi_tensor"``, one kernel for all parameters of a kind, for pointwise optimizers
            on CUDA GPUs and on a CPU; ``"inductor"``, which compiles the optimizer's own step with
            norm and scale fused into the update; ``"eager"``. A mode asked for by name goes eager
            with one ``FallbackWarning`` where it cannot be. ``"auto"`` is the first where it
            serves, and eager elsewhere.
        process_group: the ranks that hold other plain parameters under the same bound: a pipeline's
            stages, FSDP1's shards. A ``ProcessGroup``, a ``DeviceMesh``, or a list of these, in
            each of which this rank is. ``DTensor`` and ``DistributedDataParallel`` need none.

    Returns:
        A ``ClippedOptimizer``.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or a number is not one.
        ValueError: a value is out of its range, ``optimizer`` is wrapped already, its step needs a
            closure (``LBFGS``), it is what ``accelerator.prepare`` has made of one, or this rank is
            not in ``process_group``.
    """
    groups = given_groups(process_group)
    settings = ClipSettings(max_norm, norm_type, nonfinite, write_grads, mode, groups)
    return ClippedOptimizer(optimizer, settings)


class ClippedOptimizer(Delegate):
    """An optimizer whose ``step`` clips by total norm; made by ``compileclip.wrap``.

    ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are the wrapped optimizer's own,
    so that a checkpoint moves freely between wrapped and unwrapped. Its hooks are shared too: they
    run once, before the norm is taken and after the update, and get the wrapper. Whatever else the
    wrapped optimizer has can be read through the wrapper.

    Attributes:
        optimizer: the wrapped optimizer.
    """

    _stand_in: StandIn
    _settings: ClipSettings
    _modes: Modes
    _keys: validation.Keys
    _clipped_before: ClippedBefore | None

    def __init__(self, optimizer: Optimizer, settings: ClipSettings) -> None:
        _check_not_wrapped(optimizer)
        check_optimizer(optimizer)
        validation.check_optimizer(optimizer, parts=settings.process_group is not None)
        self.__setstate__({"optimizer": optimizer, "settings": settings, "total_norm": None})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the total norm of all gradients, clip, and update.

        Args:
            closure: reevaluates the model and returns the loss; called once, before the norm.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient lies on another device than its parameter, or the norm is not
                finite and ``nonfinite="raise"``. Nothing was changed.
            ValueError: a parameter group has got a bound of its own. Nothing was changed.
        """
        if torch.compiler.is_compiling():
            have = have_gradients(self._stand_in)
            reason = self._why_not_traced(closure, have)
            if reason is None:
                norm = traced_step(self._stand_in, self._settings, have)
                self._stand_in.total_norm = norm  # torch 2.11 does not trace setters of optimizers
                return None
            torch._dynamo.graph_break(msg=reason)
            return self._untraced_step(closure)
        return self._eager_step(closure)

    def _eager_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The step outside of ``torch.compile``."""
        self._keys.check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self.__dict__  # a GradScaler leaves these on an optimizer that unscales by itself
        scaled = "grad_scale" in given or "found_inf" in given
        scaler = Scaler(given.get("grad_scale"), given.get("found_inf")) if scaled else None
        with self._modes.lock:
            kernels = self._modes.kernels
            norm = None if kernels is None else kernels.step_again(self._settings, scaler)
            if norm is None:
                self._step(scaler or Scaler(), closure)
            else:
                self._stand_in.total_norm = norm
        # A scheduler made before wrapping watches the wrapped optimizer's step through this.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        norms = self._clipped_before
        if norms is not None and norms.over(self.total_norm, self.max_norm):
            self._clipped_before = None
        return loss

    def _step(self, scaler: Scaler, closure: Callable[[], Any] | None) -> None:
        """Step, where this step may be another than the last."""
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # which no_grad comes to, by way of two objects
        try:
            self._modes.step(self._settings, scaler, self._report)
        except Exception as error:
            if validation.misses_its_closure(error, closure is not None):
                raise validation.missed_closure(self.optimizer) from error
            raise
        finally:
            torch._C._set_grad_enabled(before)

    # Apart from the step outside of torch.compile, which need not pay for keeping Dynamo out.
    _untraced_step = torch._disable_dynamo(_eager_step)  # type: ignore[attr-defined]

    @property
    def total_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, or None before the first step.

        A 0-dim tensor on the device, float32 or float64. With a ``GradScaler`` it is the norm of
        the unscaled gradients.
        """
        return self._stand_in.total_norm

    @total_norm.setter
    def total_norm(self, value: Tensor | None) -> None:
        # Dynamo loses what is set on an optimizer, but not on another object.
        self._stand_in.total_norm = value

    def _why_not_traced(self, closure: object, have: tuple[bool, ...]) -> str | None:
        """Why a step cannot be part of a graph, or None if it can.

        Args:
            closure: what the step was given.
            have: which parameters have a gradient.
        """
        if closure is not None:
            return "step was given a closure"
        live = self._stand_in.live
        if any(k in g and k not in live.defaults for g in live.param_groups for k in BOUNDS):
            return "a parameter group has a bound of its own"
        if "found_inf" in self.__dict__:
            return "a GradScaler is used, which decides on the host"
        nonfinite = self._settings.nonfinite
        if nonfinite == "raise":
            return 'nonfinite="raise" decides on the host'
        if self._stand_in.holds_shards() or self._settings.process_group:
            return "ranks hold parts of the parameters, whose norm is reduced outside of the graph"
        if nonfinite == "skip" and not self._stand_in.can_undo(have):
            return 'nonfinite="skip" decides on the host here, as the step may make new state'
        if self._stand_in.lacks_gradients(have):
            return WITHOUT_GRADIENTS  # or Dynamo has lost them: better asked than silent
        return self._stand_in.why_not_backward()

    def _report(self, norm: Tensor) -> None:
        self.total_norm = norm

    @property
    def max_norm(self) -> float | None:
        """The largest total norm that gradients keep, or None; may be set at any time."""
        return self._settings.max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        if "_settings" not in self.__dict__:
            # Fabric and Lightning put an object in front whose class is made of this one, and which
            # reads what it has not from the optimizer that it holds. That one is to know.
            self.optimizer.max_norm = value  # type: ignore[attr-defined]
            return
        self._settings = replace(self._settings, max_norm=value)
        self._modes.set_bound(self._settings.max_norm)

    norm_type = Fixed[float]("The order p of the norm.")
    nonfinite = Fixed[str]('What a NaN or infinite norm does: "propagate", "raise" or "skip".')
    write_grads = Fixed["bool | None"](
        "Whether ``p.grad`` holds the clipped gradient after a step; None for no promise."
    )
    mode = Fixed[str]("The mode that was asked for.")
    process_group = Fixed[object]("The ranks that hold other plain parameters, or None.")

    def explain(self) -> str:
        """A table of what a step does: per bucket its mode, size, scaling and bytes moved."""
        from compileclip.explain import explain  # tabulate is not needed for training

        return explain(self.optimizer, self._settings, self._modes)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Asked by GradScaler. True: the step is called on an overflow too, unscales, and decides.
        # Else the scaler decides, and trainers see by a step that is not called that it did.
        if self.mode == "inductor":
            return False
        return self.nonfinite == "skip" or decides_on_overflows(self.optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        if torch.compiler.is_compiling() and set_to_none:
            self._stand_in.mend()
            for group in self._stand_in.live.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            self.optimizer.zero_grad(set_to_none)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in asdict(self._settings).items())
        return f"{type(self).__name__} ({settings})\n{self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "settings": self._settings,
            "total_norm": self.total_norm,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._delegate_to(state["optimizer"])
        self._settings = state["settings"]
        self._modes = Modes(self.optimizer)
        self._keys = validation.Keys(self.optimizer)
        self._stand_in = stand_in(self.optimizer)
        self.total_norm = state["total_norm"]
        self._clipped_before = ClippedBefore()


# Where Dynamo cannot trace a step in its place, it does not try the code in here piece by piece.
leave_out(ClippedOptimizer.step)

# A scheduler replaces an optimizer's step by one that sets _opt_called, and that Dynamo does not
# trace. This one says by itself whether it was called, so a scheduler may leave it in place.
ClippedOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _check_not_wrapped(optimizer: object) -> None:
    if isinstance(optimizer, ClippedOptimizer):
        raise ValueError(
            f"this {type(optimizer.optimizer).__name__} is wrapped already, with max_norm="
            f"{optimizer.max_norm}; change its max_norm instead of wrapping it twice"
        )
