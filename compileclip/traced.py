"""The step as Dynamo traces it inside a compiled training step.

It runs on a stand-in for the optimizer (``standing_in.py``). Private parts of torch used here, read
in torch 2.11 to 2.13: ``_init_group``, ``_torchdynamo_orig_callable``, wrappers of ``step``,
``set_code_exec_strategy``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import ops, reference
from compileclip.eager import is_torchs_own
from compileclip.settings import ClipSettings

if TYPE_CHECKING:
    from compileclip.standing_in import StandIn


# Of what ClippedOptimizer.step breaks a graph for.
REMEDY = "change that, or leave the step out of the graph"


def compiler_errors() -> tuple[type[Exception], ...]:
    """What Dynamo raises before a step has run.

    The last is for its limit of compilations, where a full graph was asked for
    (``torch._dynamo.config.recompile_limit``).
    """
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit


class CannotCompileError(RuntimeError):
    """Why a step is not to be compiled, and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.cause, self.remedy = cause, remedy


def as_refusal(error: BaseException) -> CannotCompileError:
    """The refusal that ``error``, which Dynamo raised, goes back to, or one that tells of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CannotCompileError):
            return cause
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "inner_exception", None)
    ours = re.search(r"(?:User-inserted graph break\. Message|compileclip): (.*)", str(error))
    if ours is not None:  # ClippedOptimizer.step or leaves.py says why it breaks the graph
        return CannotCompileError(ours.group(1), REMEDY)
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return CannotCompileError(
            f"it was compiled {torch._dynamo.config.recompile_limit} times, the most that "
            "torch._dynamo.config.recompile_limit allows",
            "hold constant what changes from step to step (TORCH_LOGS=recompiles names it), or run "
            "it in eager mode",
        )
    reason = " ".join(str(error).strip().split("\n\n")[0].split())
    return CannotCompileError(
        f"{type(error).__name__}: {reason}",
        "run it in eager mode, or see the cause with TORCHDYNAMO_VERBOSE=1",
    )


def raw_step(optimizer: Optimizer) -> Any:
    """The step without its hooks, and without the graph breaks that torch has around it."""
    torch._dynamo.eval_frame.TorchPatcher.patch()
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    code = getattr(step, "__code__", None)
    return step.__wrapped__ if code is not None and code.co_name == "_use_grad" else step


def initialize_state(
    optimizer: Optimizer,
    with_grad: bool = False,
    capturable: bool = True,
    among: tuple[bool, ...] | None = None,
) -> int:
    """Make the state that the first step would make, as far as torch has a function for it.

    A graph that makes state is another one than that of all later steps.

    Args:
        optimizer: whose state is made.
        with_grad: of those parameters only that have a gradient.
        capturable: make groups on a GPU capturable, as torch.compile does, for their step counts
            to be on the device.
        among: of those parameters only that are True here, in the order of the groups. (State may
            depend on the learning rate of the first step with a gradient.)

    Returns:
        The number of parameters that have state now and had none.
    """
    function = getattr(type(optimizer), "_init_group", None)
    made = 0
    if function is None or not is_torchs_own(optimizer):
        return made  # that of another class may do more
    function = getattr(function, "_torchdynamo_orig_callable", function)
    lists = list(inspect.signature(function).parameters.values())[2:]
    wanted = _chosen(optimizer, with_grad, among)
    for group in optimizer.param_groups:
        fresh = [p for p in group["params"] if p in wanted and not optimizer.state.get(p)]
        if not fresh:
            continue
        if capturable and "capturable" in group and any(p.is_cuda for p in fresh):
            group["capturable"] = True
        kept, new = [p.grad for p in group["params"]], set(fresh)
        try:
            for p in group["params"]:
                usual = p.grad is not None and p.grad.layout == torch.strided
                p.grad = None if p not in new else p.grad if usual else torch.zeros_like(p)
            with torch.no_grad():
                function(optimizer, group, *([] for _ in lists))
        finally:
            for p, grad in zip(group["params"], kept, strict=True):
                p.grad = grad
        made += len(fresh)
    return made


def _chosen(
    optimizer: Optimizer, with_grad: bool = False, among: tuple[bool, ...] | None = None
) -> set[Tensor]:
    """Those parameters that are to have state; see ``initialize_state``."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if among is not None:
        return {p for p, chosen in zip(params, among, strict=True) if chosen}
    return {p for p in params if (p.grad is not None if with_grad else p.requires_grad)}


def can_undo(optimizer: Optimizer, among: tuple[bool, ...] | None = None) -> bool:
    """Whether ``nonfinite="skip"`` can be decided in a graph.

    It can where a step changes tensors that are there before it and nothing else. So do torch's
    optimizers; but SGD makes its momentum buffer in the first step, as a copy of the gradient.

    Args:
        optimizer: whose step it is.
        among: the parameters that have a gradient, as in ``initialize_state``; else all that
            require one.
    """
    initialize_state(optimizer, among=among)
    wanted = _chosen(optimizer, among=among)
    return is_torchs_own(optimizer) and all(
        "momentum_buffer" in optimizer.state.get(p, ())
        for group in optimizer.param_groups
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] != 0
        for p in group["params"]
        if p in wanted
    )


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
        norm = ops.total_norm(grads, settings.norm_type)
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
