"""``clipped``: a class of wrapped optimizers, for frameworks that make the optimizer themselves."""

from __future__ import annotations

import copyreg
import inspect
from functools import cache
from typing import Any

from torch.optim import Optimizer

from compileclip.optimizer import ClippedOptimizer
from compileclip.settings import ClipSettings


class _ClippedType(type):
    """The type of classes that ``clipped`` makes, which are pickled as a call of it."""

    _made_by: tuple[type[Optimizer], ClipSettings]


def clipped(
    optimizer_class: type[Optimizer],
    max_norm: float | None,
    *,
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    write_grads: bool | None = None,
    mode: str = "auto",
) -> type[ClippedOptimizer]:
    """Make a class whose instances are ``wrap(optimizer_class(...), max_norm, ...)``.

    For frameworks that are given a class and keyword arguments, such as
    ``optimizer_cls_and_kwargs`` of Hugging Face's ``Trainer``, Lightning's command line and Hydra.

    Args:
        optimizer_class: a subclass of ``torch.optim.Optimizer``.
        max_norm: as of ``wrap``; so are the others.
        norm_type: see there.
        nonfinite: see there.
        write_grads: see there.
        mode: see there.

    Returns:
        A subclass of ``ClippedOptimizer`` that takes the arguments of ``optimizer_class``, whose
        signature it has. The same arguments give the same class; it can be pickled, and so can
        its instances.

    Raises:
        TypeError: ``optimizer_class`` is no class of optimizers, or a number is not one.
        ValueError: a value is out of its range.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            f"clipped() takes a class of optimizers, got {optimizer_class!r}; to clip the steps of "
            "an optimizer that is there already, call compileclip.wrap"
        )
    settings = ClipSettings(max_norm, norm_type, nonfinite, write_grads, mode)
    return _clipped(optimizer_class, settings)  # type: ignore[arg-type]  # a class has a hash


@cache  # settings are frozen
def _clipped(optimizer_class: type[Optimizer], settings: ClipSettings) -> type[ClippedOptimizer]:
    def make(self: ClippedOptimizer, *args: Any, **kwargs: Any) -> None:
        ClippedOptimizer.__init__(self, optimizer_class(*args, **kwargs), settings)

    name = f"Clipped{optimizer_class.__name__}"
    made: Any = _ClippedType(
        name,
        (ClippedOptimizer,),
        {
            "__init__": make,
            "__doc__": f"{optimizer_class.__name__}, whose step clips; see ``clipped``.",
            "__module__": __name__,
            "__qualname__": name,
            "__signature__": inspect.signature(optimizer_class),
            "_made_by": (optimizer_class, settings),
        },
    )
    return made  # type: ignore[no-any-return]


def _reduced(made: Any) -> tuple[Any, tuple[type[Optimizer], ClipSettings]]:
    return _clipped, made._made_by


copyreg.pickle(_ClippedType, _reduced)
