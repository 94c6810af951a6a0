"""What an optimizer keeps besides parameters and state: a shadow may share it, or has a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager.unhooked_step import is_torchs_own

# What cannot change under a step's hands: a shadow may share it with the real optimizer.
_FIXED = (
    *(int, float, complex, str, bytes, type(None), type, Enum, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)


def why_not(optimizer: Optimizer) -> str | None:
    """Why a shadow's step could change the real optimizer, or what it keeps could be missed."""
    if is_torchs_own(optimizer):
        return None
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        if name == "step" or name in usual():
            continue  # its own, in the wrapper that a scheduler puts around it
        if not (is_fixed(value) or is_data(value)):
            return f"the optimizer keeps a {type(value).__name__} in its attribute {name!r}"
        if isinstance(value, dict | set | frozenset) and not ids.isdisjoint(value):
            return f"the optimizer tells parameters by their identity in its attribute {name!r}"
    steps = [c for c in type(optimizer).__mro__ if c is not Optimizer and "step" in vars(c)]
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")  # which Optimizer makes
    if len(steps) > 1 and any(getattr(optimizer, name, None) for name in names):
        return f"a step of {steps[1].__name__} in that of {steps[0].__name__} may run hooks"
    other = next((key for key in optimizer.state if not isinstance(key, Tensor)), None)
    return None if other is None else f"the optimizer keeps {other!r} in its state"


@cache
def usual() -> frozenset[str]:
    """The attributes of every optimizer."""
    return frozenset(vars(Optimizer([torch.nn.Parameter(torch.empty(0, device="cpu"))], {})))


def is_fixed(value: object) -> bool:
    """Whether it cannot change in place."""
    if isinstance(value, tuple | frozenset):
        return all(map(is_fixed, value))
    return isinstance(value, _FIXED)


def is_data(value: object) -> bool:
    """Whether it is a list, dictionary or set of what is fixed: copied, it can be compared."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return isinstance(value, list | set) and all(map(is_fixed, value))


def marks(params: Sequence[Tensor]) -> list[Any]:
    """What a step may ask of parameters besides their numbers, and a user may change."""
    return [(p.requires_grad, *vars(p), *map(id, vars(p).values())) for p in params]


def copied(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``values``, which may be the same where there are none."""
    return deepcopy(values) if values else values


def unlike(copies: Mapping[str, Any], originals: Mapping[str, Any]) -> str | None:
    """The name of a copy that is no longer as its original."""
    for name, value in originals.items():
        same = copies[name] == value
        if not (same.all() if isinstance(same, Tensor) else same):
            return name
    return None
