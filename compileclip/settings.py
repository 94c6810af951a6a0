"""What a user chose when wrapping an optimizer, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compileclip.distributed.process_groups import ProcessGroups

T = TypeVar("T")
NONFINITE = ("propagate", "raise", "skip")
MODES = ("auto", "eager", "inductor", "multi_tensor")


@dataclass(frozen=True)
class ClipSettings:
    """The arguments of ``compileclip.wrap``; see there.

    Raises:
        TypeError: a number is not one.
        ValueError: a value is out of its range.
    """

    max_norm: float | None
    norm_type: float = 2.0
    nonfinite: str = "propagate"
    write_grads: bool | None = None
    mode: str = "auto"
    process_group: ProcessGroups | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            object.__setattr__(self, "max_norm", _max_norm(self.max_norm))
        object.__setattr__(self, "norm_type", _number("norm_type", self.norm_type))
        if math.isnan(self.norm_type):
            raise ValueError("norm_type is nan; pass the order of a norm, such as 2.0 or inf")
        if self.nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite={self.nonfinite!r} is unknown; choose from {NONFINITE}")
        if self.write_grads is not None and not isinstance(self.write_grads, bool):
            raise ValueError(f"write_grads={self.write_grads!r}; choose from None, True, False")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown; choose from {MODES}")


class Fixed(Generic[T]):
    """An attribute that reads one of an object's ``_settings``, which stays as it was chosen.

    Set later, it would have to undo what was decided by it, so that is refused.
    """

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        return cast(T, self if instance is None else getattr(instance._settings, self._name))

    def __set__(self, instance: Any, value: object) -> None:
        raise AttributeError(
            f"{self._name} is {getattr(instance, self._name)!r} since the optimizer was wrapped, "
            f"and cannot be set; wrap it anew: compileclip.wrap(opt.optimizer, opt.max_norm, "
            f"{self._name}={value!r})"
        )


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a tensor, whose value would be read now and never again; pass "
            f"float({name}), and set opt.max_norm for another bound"
        )
    # Others may be what float() takes, as NumPy's arrays are, and change later.
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name}={value!r} is no number; pass a float")
    return float(value)


def _max_norm(value: object) -> float:
    max_norm = _number("max_norm", value)
    if math.isnan(max_norm) or max_norm < 0:
        raise ValueError(
            f"max_norm={max_norm} is no bound of a norm; pass a number >= 0, "
            "or None to measure the norm without clipping"
        )
    return max_norm
