"""The step as Dynamo traces it inside a compiled training step.

Dynamo does not trace the step of a ``torch.optim.Optimizer`` in a graph that also computes its
gradients: its model of an optimizer runs ``_init_group`` on the real object, whose gradients do not
exist yet. So the step runs here on a stand-in: an object that is no ``Optimizer`` but has the
class's own functions, and the optimizer's own groups and state. Private parts of torch used here,
read in torch 2.11 to 2.13: ``_init_group``, ``_torchdynamo_orig_callable``.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import ops, reference
from compileclip.eager import is_torchs_own
from compileclip.functional import is_sharded
from compileclip.settings import ClipSettings


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
    ours = re.search(r"User-inserted graph break\. Message: (.*)", str(error))
    if ours is not None:  # ClippedOptimizer.step says there why it breaks the graph
        return CannotCompileError(ours.group(1), "change that, or leave the step out of the graph")
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


class StandIn:
    """Has what the functions of an optimizer's class ask of ``self``.

    Attributes:
        total_norm: what the last step measured.
        prepare: makes missing state, when Dynamo traces a call of it.
        mend: ``mend_dynamo``, likewise.
        holds_shards: whether a parameter is a ``DTensor``, likewise.
        can_undo: ``can_undo``, likewise.
    """

    prepare: Callable[[], int]
    mend: Callable[[], int]
    holds_shards: Callable[[], bool]
    can_undo: Callable[[], bool]

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.total_norm: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """The optimizer's own state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return self.optimizer.defaults


def stand_in(optimizer: Optimizer) -> Any:
    """Make the stand-in of ``optimizer``, with its class's functions as methods."""
    methods: dict[str, Any] = {}
    for cls in reversed(type(optimizer).__mro__[:-1]):
        for name, value in vars(cls).items():
            if isinstance(value, types.FunctionType | staticmethod) and not name.startswith("__"):
                # Dynamo's patches disable some of them for tracing.
                methods[name] = getattr(value, "_torchdynamo_orig_callable", value)
    methods["step"] = raw_step(optimizer)
    made = type(f"StandInFor{type(optimizer).__name__}", (StandIn,), methods)(optimizer)

    # Constants to Dynamo, which so runs them for real while it traces.
    made.prepare = torch._dynamo.assume_constant_result(lambda: initialize_state(optimizer))
    made.mend = torch._dynamo.assume_constant_result(mend_dynamo)
    made.holds_shards = torch._dynamo.assume_constant_result(
        lambda: any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    )
    made.can_undo = torch._dynamo.assume_constant_result(lambda: can_undo(optimizer))
    return made


def raw_step(optimizer: Optimizer) -> Any:
    """The step without its hooks, and without the graph breaks that torch has around it."""
    torch._dynamo.eval_frame.TorchPatcher.patch()
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    return step.__wrapped__ if step.__code__.co_name == "_use_grad" else step


def initialize_state(optimizer: Optimizer, with_grad: bool = False, capturable: bool = True) -> int:
    """Make the state that the first step would make, as far as the class has a function for it.

    A graph that makes state is another one than that of all later steps.

    Args:
        optimizer: whose state is made.
        with_grad: of those parameters only that have a gradient.
        capturable: make groups on a GPU capturable, as torch.compile does, for their step counts
            to be on the device.

    Returns:
        The number of parameters that have state now and had none.
    """
    function = getattr(type(optimizer), "_init_group", None)
    made = 0
    if function is None:
        return made
    function = getattr(function, "_torchdynamo_orig_callable", function)
    lists = list(inspect.signature(function).parameters.values())[2:]
    if any(each.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for each in lists):
        return made  # it cannot be told what this one takes
    for group in optimizer.param_groups:
        fresh = [
            p
            for p in group["params"]
            if (p.grad is not None if with_grad else p.requires_grad) and not optimizer.state.get(p)
        ]
        if not fresh:
            continue
        if capturable and "capturable" in group and any(p.is_cuda for p in fresh):
            group["capturable"] = True
        kept, among = [p.grad for p in group["params"]], set(fresh)
        try:
            for p in group["params"]:
                usual = p.grad is not None and p.grad.layout == torch.strided
                p.grad = None if p not in among else p.grad if usual else torch.zeros_like(p)
            with torch.no_grad():
                function(optimizer, group, *([] for _ in lists))
        finally:
            for p, grad in zip(group["params"], kept, strict=True):
                p.grad = grad
        made += len(fresh)
    return made


def can_undo(optimizer: Optimizer) -> bool:
    """Whether ``nonfinite="skip"`` can be decided in a graph.

    It can where a step changes tensors that are there before it and nothing else. So do torch's
    optimizers; but SGD makes its momentum buffer in the first step, as a copy of the gradient.
    """
    initialize_state(optimizer)
    params = [(g, p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    return is_torchs_own(optimizer) and all(
        "momentum_buffer" in optimizer.state.get(p, ())
        for group, p in params
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"] != 0
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


def traced_step(standing_in: Any, settings: ClipSettings) -> Tensor:
    """Norm, scale and update, in Python that Dynamo traces into one graph.

    Returns:
        The total norm of the gradients before clipping.
    """
    standing_in.prepare()
    with torch.no_grad():
        params = [p for g in standing_in.param_groups for p in g["params"] if p.grad is not None]
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
            standing_in.step()
        else:
            step_where(finite, standing_in.step, params, standing_in.state)
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
    if grad.dtype in reference.HALF:
        return (grad.float() * coef).to(grad.dtype)
    return grad * coef
