"""Which optimizers can be wrapped, and what to do with the others.

Private parts used here, read in torch 2.13: ``_optimizer_step_pre_hooks``, which
``Optimizer.__init__`` makes. Read in lightning 2.6.6: ``_strategy``, ``precision``,
``precision_plugin`` and ``scaler``.
"""

from __future__ import annotations

import inspect

from torch.optim import Optimizer


def check_optimizer(optimizer: object) -> None:
    """Refuse what no step can be fused into.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``.
        ValueError: its step needs a closure, or it is what a trainer has made of another one and
            cannot be wrapped any more.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"wrap() takes a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "make it one, or call compileclip.clip_grad_norm_ before its step"
        )
    check_step(type(optimizer))
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"{type(optimizer).__name__} stands in front of another optimizer, as "
            "accelerator.prepare() puts it there, and decides when that one steps; wrap the "
            "optimizer itself, and before: accelerator.prepare(compileclip.wrap(optimizer, ...))"
        )
    if _unscales_in_its_step(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} unscales gradients in its step, for a GradScaler of its "
            "trainer, so they would be clipped while they are scaled; wrap the optimizer itself, "
            "and before: fabric.setup(model, compileclip.wrap(optimizer, ...)), or in "
            "configure_optimizers"
        )


def check_step(kind: type[Optimizer]) -> None:
    """Refuse classes whose step may evaluate the model many times.

    Raises:
        ValueError: it needs a closure.
    """
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{kind.__name__}.step needs a closure, which it may call many times in one "
            "step; call compileclip.clip_grad_norm_ inside the closure instead of wrapping"
        )


def _unscales_in_its_step(optimizer: Optimizer) -> bool:
    """Whether it is Fabric's or Lightning's, with a ``GradScaler``.

    Without one these work: their step is that of the optimizer that they hold.
    """
    strategy = vars(optimizer).get("_strategy")
    precisions = (getattr(strategy, name, None) for name in ("precision", "precision_plugin"))
    return any(getattr(precision, "scaler", None) is not None for precision in precisions)
