"""The step as Dynamo traces it inside a compiled training step.

It runs on a stand-in for the optimizer (``dynamo_stand_in.py``). Private parts of torch used
here, read in torch 2.11 to 2.13: ``set_code_exec_strategy``, Dynamo's object for None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compileclip.eager import operators, reference
from compileclip.settings import ClipSettings

if TYPE_CHECKING:
    from compileclip.graph.dynamo_stand_in import StandIn


def mend_dynamo() -> int:
    """Make None mean None again in what Dynamo traces next.

    Reading ``p.grad`` where it is None, Dynamo 2.13 notes that place on the one object that stands
    for all Nones; a later ``p.grad = None``, of another function too, would then load from there.
    """
    none = getattr(torch._dynamo.variables.constant, "CONSTANT_VARIABLE_NONE", None)
    if none is None or none.source is None:
        return 0
    none.source = None
    return 1


def leave_out(function: Callable[..., Any]) -> None:
    """Let Dynamo not compile ``function`` by itself, nor what it calls; only as part of a caller.

    Unlike ``torch.compiler.disable`` this wraps nothing, and leaves inlining as it is.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    strategy = dynamo._FrameExecStrategy(skip, skip)
    dynamo.set_code_exec_strategy(function.__code__, strategy)


def traced_step(standing_in: StandIn, settings: ClipSettings, have: tuple[bool, ...]) -> Tensor:
    """Norm, scale and update, in Python that Dynamo traces into one graph.

    Args:
        standing_in: of the optimizer.
        settings: how to clip.
        have: what ``have_gradients`` says.

    Returns:
        The total norm of the gradients before clipping.
    """
    standing_in.prepare(have)
    with torch.no_grad():
        params = [
            p for g in standing_in.live.param_groups for p in g["params"] if p.grad is not None
        ]
        if not params:
            return torch.tensor(0.0)
        grads = [p.grad for p in params]
        norm = operators.total_norm(grads, settings.norm_type)
        finite = norm.isfinite() if settings.nonfinite == "skip" else None
        if settings.max_norm is not None:
            coef = reference.clip_coef(settings.max_norm, norm)
            if finite is not None:
                coef = torch.where(finite, coef, 1.0)
            for p, grad in zip(params, grads, strict=True):
                p.grad = _scaled(grad, coef)
        if finite is None:
            standing_in.raw_step(standing_in.stepping)
        else:
            step_where(
                finite,
                lambda: standing_in.raw_step(standing_in.stepping),
                params,
                standing_in.live.state,
            )
        if settings.write_grads is False:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        return norm


def step_where(
    finite: Tensor, step: Callable[[], object], params: list[Tensor], state: Any
) -> None:
    """Step, and take back every change unless ``finite``; on the device, in the update's kernels.

    The copies exist in the traced code alone: a functional graph still has the old values.
    """
    touched = [
        *params,
        *(v for p in params for v in state.get(p, {}).values() if isinstance(v, Tensor)),
    ]
    before = [t.clone() for t in touched]
    step()
    for new, old in zip(touched, before, strict=True):
        new.copy_(torch.where(finite.to(new.device), new, old))


def _scaled(grad: Tensor, coef: Tensor) -> Tensor:
    coef = coef.to(grad.device)
    wide = grad.float() if grad.dtype in reference.HALF else grad
    return (wide * coef).to(grad.dtype)  # of 0 dimensions, a wider coefficient makes it wider
