"""Mode ``eager``: torch's own kernels, with the clip coefficient handed to the optimizer's step.

Three ways to hand it over, from the cheapest:

* torch's fused kernels divide each gradient by ``optimizer.grad_scale`` as they read it;
* the gradients are scaled in place, as ``clip_grad_norm_`` does;
* with ``write_grads=False`` the step runs on scaled copies, some parameters at a time.

Private parts of torch used here, read in torch 2.11 to 2.13: the attributes ``grad_scale`` and
``found_inf`` (the protocol between ``GradScaler`` and the fused optimizers), ``Optimizer.step``'s
``hooked`` and ``__wrapped__``, ``_debug_has_internal_overlap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.distributed.shards import any_sharded, is_sharded, local
from compileclip.eager import memory_layout, reference
from compileclip.eager.checks import nonfinite_message
from compileclip.eager.functional import norm_here
from compileclip.eager.unhooked_step import is_torchs_own, step_on_copies, unhooked_step
from compileclip.settings import ClipSettings

_grad = attrgetter("grad")


@dataclass
class Scaler:
    """What a ``GradScaler`` says of a step.

    ``grad_scale`` is the factor by which the loss, and so the gradients, are still multiplied;
    ``found_inf`` is not 0 where the step must not count. Both are 0-dim float32 tensors or None.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """What there is of it, by name, on ``device``."""
        return {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }

    def unscaled(self, norm: Tensor) -> Tensor:
        """The norm of the gradients with ``grad_scale`` taken out."""
        return norm if self.grad_scale is None else norm / self.grad_scale.to(norm.device)


@dataclass
class Gradients(Scaler):
    """The gradients of one step: those of ``params``."""

    params: list[Tensor] = field(default_factory=list)

    def total_norm(self, norm_type: float) -> Tensor:
        """Their norm with ``grad_scale`` taken out, before clipping."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return self.unscaled(norm_here(grads, norm_type) if grads else torch.tensor(0.0))


def params_with_grad(optimizer: Optimizer) -> list[Tensor]:
    """Each parameter of ``optimizer`` that has a gradient, once.

    Raises:
        RuntimeError: a gradient lies on another device than its parameter.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in params:
        if p.grad.device != p.device:
            raise RuntimeError(
                f"a parameter of shape {tuple(p.shape)} on {p.device} has its gradient on "
                f"{p.grad.device}; move it with p.grad = p.grad.to(p.device). Nothing was changed"
            )
    return list(dict.fromkeys(params))


def update(optimizer: Optimizer, settings: ClipSettings, grads: Gradients, norm: Tensor) -> None:
    """Run the optimizer's own step on clipped gradients, or leave everything as it is.

    Args:
        optimizer: the wrapped optimizer; its hooks are not run.
        settings: how to clip.
        grads: the parameters and their gradients.
        norm: ``grads.total_norm(settings.norm_type)``.

    Raises:
        RuntimeError: ``nonfinite="raise"`` and the norm is not finite; nothing was changed.
    """
    if memory_layout.are_alike(optimizer, grads.params):
        _update(optimizer, settings, grads, norm)
        return
    with memory_layout.unfused(optimizer):
        _update(optimizer, settings, grads, norm)


def update_among(
    optimizer: Optimizer, settings: ClipSettings, grads: Gradients, norm: Tensor
) -> None:
    """``update`` with the parameters of ``grads`` alone."""
    among = set(grads.params)
    others = [(p, p.grad) for p in params_with_grad(optimizer) if p not in among]
    try:
        for p, _ in others:
            p.grad = None
        update(optimizer, settings, grads, norm)
    finally:
        for p, grad in others:
            p.grad = grad


def _update(optimizer: Optimizer, settings: ClipSettings, grads: Gradients, norm: Tensor) -> None:
    if not may_step(optimizer, settings, grads, norm):
        return
    coef = None if settings.max_norm is None else reference.clip_coef(settings.max_norm, norm)
    if coef is not None and settings.write_grads is not True and _is_known_to_be_one(coef):
        # Nothing to scale nor to write; with write_grads=True expanded ones are replaced below.
        coef = None
    amp = None if grads.grad_scale is None else grads.grad_scale.to(norm.device)
    fused = takes_grad_scale(optimizer)
    divide = fused and settings.write_grads is not False and _takes_this_scale(grads, norm)
    divisor = _quotient(amp, coef) if divide else None
    factor = None if divide else _quotient(coef, amp)
    found_inf = grads.found_inf if fused else None  # others: decided above
    attributes = {"grad_scale": divisor, "found_inf": found_inf}
    given = [name for name, tensor in attributes.items() if tensor is not None]
    for name in given:
        setattr(optimizer, name, attributes[name])
    try:
        if settings.write_grads is False and (factor is not None or _writes_gradients(optimizer)):
            step_on_copies(optimizer, grads.params, factor)
            return
        if factor is not None:
            _scale_in_place(grads.params, factor)
        unhooked_step(optimizer)()
    finally:
        for name in given:
            delattr(optimizer, name)


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Whether all groups run fused kernels of torch's own, which honour ``grad_scale``."""
    for group in optimizer.param_groups:
        if not group.get("fused"):
            return False
    return is_torchs_own(optimizer)


def may_step(optimizer: Optimizer, settings: ClipSettings, grads: Gradients, norm: Tensor) -> bool:
    """Decide whether the step counts; on the device where the optimizer can.

    Elsewhere this waits for the device: an optimizer that counts its steps on the host cannot be
    told by the device that one does not count.
    """
    if settings.nonfinite == "propagate" and grads.found_inf is None:
        return True
    skips = takes_grad_scale(optimizer)  # where found_inf is set
    if settings.nonfinite == "propagate" and skips:
        return True
    if settings.nonfinite == "skip" and _skips_on_device(optimizer, grads, norm):
        nonfinite = (~norm.isfinite()).to(torch.float32)
        found = grads.found_inf
        grads.found_inf = nonfinite if found is None else found.to(norm.device) + nonfinite
        return True
    return (skips and bool(norm.isfinite())) or counts(settings, grads.found_inf, norm)


def counts(settings: ClipSettings, found_inf: Tensor | None, norm: Tensor) -> bool:
    """Whether a step counts, decided on the host.

    Raises:
        RuntimeError: the norm is not finite and ``nonfinite="raise"``.
    """
    # An overflow that the GradScaler has seen is its business: it skips the step, no error.
    if found_inf is not None and found_inf.item():
        return False
    if settings.nonfinite == "propagate" or norm.isfinite():
        return True
    if settings.nonfinite == "raise":
        raise RuntimeError(nonfinite_message(settings.norm_type, norm))
    return False


def _skips_on_device(optimizer: Optimizer, grads: Gradients, norm: Tensor) -> bool:
    """Whether to leave "skip" to the fused kernels, which change nothing where found_inf is set.

    Not for the first step, in which the state is made: SGD would keep an uninitialized momentum.
    """
    if not _is_asynchronous(norm.device) or not takes_grad_scale(optimizer):
        return False
    stateless = {p for g in optimizer.param_groups if g.get("momentum") == 0 for p in g["params"]}
    return all(optimizer.state.get(p) or p in stateless for p in grads.params)


def _is_known_to_be_one(coef: Tensor) -> bool:
    return not _is_asynchronous(coef.device) and reference.is_one(coef)


def _is_asynchronous(device: torch.device) -> bool:
    """Whether reading a value from ``device`` would make the host wait."""
    return device.type != "cpu"


def _takes_this_scale(grads: Gradients, norm: Tensor) -> bool:
    """Whether fused kernels, which also write what they scale, may have the float32 coefficient.

    A float64 gradient deserves a float64 one, a ``DTensor`` takes no plain scale, and a gradient of
    two parameters would be scaled twice.
    """
    params = grads.params
    distinct = len(params) == 1 or len(set(map(id, map(_grad, params)))) == len(params)
    return norm.dtype == torch.float32 and distinct and not any_sharded(params)


def _quotient(dividend: Tensor | None, divisor: Tensor | None) -> Tensor | None:
    """``dividend / divisor``, where None stands for 1."""
    if divisor is None:
        return dividend
    return divisor.reciprocal() if dividend is None else dividend / divisor


def make_writable(params: Sequence[Tensor]) -> None:
    """Replace gradients that cannot be written in place, such as expanded ones, by copies."""
    for p in params:
        grad = p.grad
        assert grad is not None
        # An expanded gradient cannot be written in place, and torch would find that out only after
        # it has scaled those before it.
        if _is_plain(grad) and torch._debug_has_internal_overlap(grad) == 1:
            p.grad = grad.contiguous()


def _scale_in_place(params: Sequence[Tensor], factor: Tensor) -> None:
    make_writable(params)
    distinct = {id(p.grad): p.grad for p in params if p.grad is not None}
    reference.scale_([local(g) for g in distinct.values()], factor)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not is_sharded(tensor)


def _writes_gradients(optimizer: Optimizer) -> bool:
    """Whether the step may write gradients: torch's foreach SGD adds its momentum to them."""
    adds = (g.get("nesterov") and g.get("foreach") is not False for g in optimizer.param_groups)
    return any(adds) or not is_torchs_own(optimizer)
