"""An optimizer's bare step, and the state that its first step would make.

Private parts of torch used here, read in torch 2.11 to 2.13: ``_init_group``,
``_torchdynamo_orig_callable``, wrappers of ``step``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager.unhooked_step import is_torchs_own


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
