"""``clipped``: a class of optimizers that clip, for whoever makes an optimizer from its class."""

from __future__ import annotations

import copyreg
import inspect
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from compileclip.distributed.shards import given_groups
from compileclip.optimizer import ClippedOptimizer
from compileclip.settings import ClipSettings
from compileclip.wrappable import check_step


class ClippedClass(type):
    """The type of the classes that ``clipped`` makes.

    They are in no module, so that they are pickled as the call of ``clipped`` that made them.

    Attributes:
        wrapped_class: the class whose instances are wrapped.
        settings: how they are wrapped.
    """

    wrapped_class: type[Optimizer]
    settings: ClipSettings


_classes: dict[tuple[type[Optimizer], ClipSettings], type[ClippedOptimizer]] = {}


def clipped(
    cls: type[Optimizer],
    max_norm: float | None,
    *,
    norm_type: float = 2.0,
    nonfinite: str = "propagate",
    write_grads: bool | None = None,
    mode: str = "auto",
    process_group: Any = None,
) -> type[ClippedOptimizer]:
    """Make of an optimizer's class one whose instances clip.

    ``clipped(AdamW, max_norm=1.0)(params, lr=3e-4)`` is ``wrap(AdamW(params, lr=3e-4), 1.0)``, for
    frameworks that take a class and its arguments, as the ``Trainer`` of transformers does.

    Args:
        cls: a class of optimizers whose step needs no closure.
        max_norm: as in ``wrap``, like all that follows.
        norm_type: the order of the norm.
        nonfinite: what a NaN or infinite norm does.
        write_grads: whether ``p.grad`` holds the clipped gradient after the step.
        mode: how the step is run.
        process_group: the ranks that hold other plain parameters.

    Returns:
        A subclass of ``ClippedOptimizer`` that takes the arguments of ``cls``, named after it
        (``ClippedAdamW``). The same arguments give the same class; it can be pickled.

    Raises:
        TypeError: ``cls`` is no class of optimizers, or a number is not one.
        ValueError: a value is out of its range, the instances of ``cls`` clip already, or their
            step needs a closure.
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(
            f"clipped() takes a class of torch.optim.Optimizer, got {cls!r}; "
            "an optimizer that is made already goes to compileclip.wrap"
        )
    if issubclass(cls, ClippedOptimizer):
        raise ValueError(f"{cls.__name__} clips already; call clipped() with the class it wraps")
    check_step(cls)
    groups = given_groups(process_group)
    settings = ClipSettings(max_norm, norm_type, nonfinite, write_grads, mode, groups)
    made = _classes.get((cls, settings))
    # By setdefault, for two threads may come here at once.
    return _classes.setdefault((cls, settings), _made(cls, settings)) if made is None else made


def _made(cls: type[Optimizer], settings: ClipSettings) -> type[ClippedOptimizer]:
    def __init__(self: ClippedOptimizer, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # of the class made here
        ClippedOptimizer.__init__(self, cls(*args, **kwargs), settings)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(cls)
    # Who builds an optimizer from a file of settings may ask either for what it takes.
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]  # as inspect
        parameters=[own, *signature.parameters.values()]
    )
    name = f"Clipped{cls.__name__}"
    members = {
        "__init__": __init__,
        "__signature__": signature,
        "__module__": __name__,
        "__doc__": f"``{cls.__module__}.{cls.__qualname__}``, wrapped with {settings}.",
        "wrapped_class": cls,
        "settings": settings,
    }
    made: Any = ClippedClass(name, (ClippedOptimizer,), members)
    return made  # type: ignore[no-any-return]  # by a call of its metaclass


def _remake(cls: type[Optimizer], settings: dict[str, Any]) -> type[ClippedOptimizer]:
    return clipped(cls, **settings)


def _reduced(made: ClippedClass) -> tuple[Any, ...]:
    return _remake, (made.wrapped_class, asdict(made.settings))


copyreg.pickle(ClippedClass, _reduced)
