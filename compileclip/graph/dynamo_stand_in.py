"""An object that steps in an optimizer's stead, for Dynamo to trace.

Dynamo does not trace the step of a ``torch.optim.Optimizer`` in a graph that also computes its
gradients: its model of an optimizer runs ``_init_group`` on the real object, whose gradients do not
exist yet, and marks parameters as it reads ``param_groups`` (``backward_leaves.py``). So the step
runs here on an object that is no ``Optimizer``, but has the class's functions and the optimizer's
own attributes. Private parts of torch used here, read in torch 2.11 to 2.13:
``_torchdynamo_orig_callable``, and ``capturable``, which Dynamo's model sets too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.distributed.shards import is_sharded
from compileclip.eager import optimizer_state
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.graph import backward_leaves, traced_step


class StandIn:
    """What Dynamo traces in an optimizer's stead.

    Attributes:
        live: has what the optimizer has; its ``__dict__`` is the optimizer's own.
        stepping: ``live`` with groups as Dynamo can step with them.
        raw_step: the step, a function of ``stepping``.
        total_norm: what the last step measured.
        prepare: makes missing state, when Dynamo traces a call of it.
        mend: ``mend_dynamo``, likewise.
        holds_shards: whether a parameter is a ``DTensor``, likewise.
        can_undo: ``can_undo``, likewise.
        why_not_backward: ``why_not_backward``, likewise.
        lacks_gradients: whether gradients may have got lost, likewise.
    """

    prepare: Callable[[tuple[bool, ...]], int]
    mend: Callable[[], int]
    holds_shards: Callable[[], bool]
    can_undo: Callable[[tuple[bool, ...]], bool]
    why_not_backward: Callable[[], str | None]
    lacks_gradients: Callable[[tuple[bool, ...]], bool]

    def __init__(self, optimizer: Optimizer) -> None:
        self.total_norm: Tensor | None = None
        members = _members(type(optimizer))
        live: Any = _with_attributes_of(optimizer, dict(members))
        self.live = self.stepping = live
        if is_torchs_own(optimizer) and "capturable" in optimizer.defaults:
            # Dynamo traces step counts that are tensors, as capturable updates take them. These
            # optimizers write nothing into their groups.
            held = [live]
            members["param_groups"] = property(
                lambda _: [{**group, "capturable": True} for group in held[0].param_groups]
            )
            # A class is in a cycle, which is not to keep the optimizer until that is collected.
            weakref.finalize(self, held.clear)
            self.stepping = _with_attributes_of(optimizer, members)
        # No attribute of it: there a scheduler may have put a step that Dynamo does not trace.
        self.raw_step = optimizer_state.raw_step(optimizer)


def stand_in(optimizer: Optimizer) -> StandIn:
    """Make the stand-in of ``optimizer``."""
    backward_leaves.patch_dynamo()
    made = StandIn(optimizer)

    def params() -> list[Tensor]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    # Constants to Dynamo, which so runs them for real while it traces.
    constant: Callable[..., Any] = torch._dynamo.assume_constant_result
    made.prepare = constant(lambda among: optimizer_state.initialize_state(optimizer, among=among))
    made.mend = constant(traced_step.mend_dynamo)
    made.holds_shards = constant(lambda: any(map(is_sharded, params())))
    made.can_undo = constant(lambda among: optimizer_state.can_undo(optimizer, among))
    made.why_not_backward = constant(lambda: backward_leaves.why_not_backward(params()))
    made.lacks_gradients = constant(
        lambda have: (
            torch._dynamo.config.trace_autograd_ops
            and not any(have)
            and any(p.requires_grad for p in params())
        )
    )
    return made


def have_gradients(standing_in: StandIn) -> tuple[bool, ...]:
    """Whether each parameter has a gradient, in the order of the groups; for Dynamo to trace."""
    groups = standing_in.live.param_groups
    return tuple([p.grad is not None for group in groups for p in group["params"]])


def _with_attributes_of(optimizer: Optimizer, members: dict[str, Any]) -> Any:
    """An object that is no ``Optimizer`` and has, live, the very attributes of ``optimizer``."""
    made = type(f"StandInFor{type(optimizer).__name__}", (), members)()
    made.__dict__ = vars(optimizer)
    return made


def _members(cls: type[Optimizer]) -> dict[str, Any]:
    """What ``cls`` has, for a class that is not derived from ``Optimizer``."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, value in vars(base).items():
            if hasattr(type(value), "__get__") and not name.startswith("__"):
                # Dynamo's patches disable some functions for tracing.
                members[name] = getattr(value, "_torchdynamo_orig_callable", value)
    # Plain values are looked up: Dynamo guards on them, but torch 2.11 on no constant of a class.
    members["__getattr__"] = lambda _, name: getattr(cls, name)
    return members
