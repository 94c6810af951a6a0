"""Which optimizers can be wrapped, and what to do with the others.

Private parts used here, read in torch 2.13: ``_optimizer_step_pre_hooks``, which
``Optimizer.__init__`` makes. Read in lightning 2.6.6: ``_strategy``, ``precision``,
``precision_plugin`` and ``scaler``.
"""

from __future__ import annotations

import inspect

from torch.optim import Optimizer

from compileclip.custom_optimizers.closure_calls import what_a_step_asks_for

_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def check_optimizer(optimizer: object) -> None:
    """Refuse what no step can be fused into.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: its step needs a closure or calls it again, or it is what a trainer has made of
            another one and cannot be wrapped any more.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"wrap() takes a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "make it one, or call compileclip.clip_grad_norm_ before its step"
        )
    name = type(optimizer).__name__
    if isinstance(getattr(optimizer, "base_optimizer", None), Optimizer):
        raise ValueError(
            f"{name} steps another optimizer, its base_optimizer, and may evaluate the closure "
            "again in its step, with gradients that would not be clipped; wrap that one: "
            f"make {name} with wrap(...) as its base optimizer, or set "
            "opt.base_optimizer = compileclip.wrap(opt.base_optimizer, max_norm)"
        )
    check_step(type(optimizer))
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{name} stands in front of another optimizer, as "
            "accelerator.prepare() puts it there, and decides when that one steps; wrap the "
            "optimizer itself, and before: accelerator.prepare(compileclip.wrap(optimizer, ...))"
        )
    if _unscales_in_its_step(optimizer):
        raise ValueError(
            f"{name} unscales gradients in its step, for a GradScaler of its "
            "trainer, so they would be clipped while they are scaled; wrap the optimizer itself, "
            "and before: fabric.setup(model, compileclip.wrap(optimizer, ...)), or in "
            "configure_optimizers"
        )


def check_step(kind: type[Optimizer]) -> None:
    """Refuse classes whose step asks for more than the wrapper has for it.

    Raises:
        ValueError: it needs a closure or another argument, or may call the closure more than once.
    """
    _, *parameters = inspect.signature(kind.step).parameters.values()
    asked = [p.name for p in parameters if p.default is p.empty and p.kind not in _ANY_NUMBER]
    if asked and asked != ["closure"]:
        raise ValueError(
            f"{kind.__name__}.step takes {', '.join(asked)} besides, which the wrapper has not; "
            "call compileclip.clip_grad_norm_ before the step instead of wrapping"
        )
    wants = "needs a closure" if asked else what_a_step_asks_for(kind)
    if wants is not None:
        raise ValueError(
            f"{kind.__name__}.step {wants}, and the wrapper evaluates a closure once, before the "
            "norm, with gradients that are clipped once; wrap the optimizer that it steps inside, "
            "where there is one, or call compileclip.clip_grad_norm_ inside the closure and step "
            f"the bare {kind.__name__}"
        )


def _unscales_in_its_step(optimizer: Optimizer) -> bool:
    """Whether it is Fabric's or Lightning's, with a ``GradScaler``.

    Without one these work: their step is that of the optimizer that they hold.
    """
    strategy = vars(optimizer).get("_strategy")
    precisions = (getattr(strategy, name, None) for name in ("precision", "precision_plugin"))
    return any(getattr(precision, "scaler", None) is not None for precision in precisions)
