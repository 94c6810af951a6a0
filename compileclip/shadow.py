"""What steps in the place of a bucket's parameters, to show what the step is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager import is_torchs_own
from compileclip.traced import raw_step

SHAPES = ((2, 3), (5,))  # a step is the same for both, or refused
_WARNED = "_warned_capturable_if_run_uncaptured"
HYPERPARAMETER = "group."  # before the name of one that is an operand


class NotPointwiseError(ValueError):
    """A step cannot become a program; the message says why."""


class StandIn:
    """What takes the place of a tensor in a step."""


# What cannot change under a step's hands: a shadow may share it with the real optimizer.
_FIXED = (
    *(int, float, complex, str, bytes, type(None), type, Enum, torch.dtype, torch.device),
    *(FunctionType, BuiltinFunctionType),
)


def why_not(optimizer: Optimizer) -> str | None:
    """Why a shadow's step could change the real optimizer, or what it keeps could be missed."""
    if is_torchs_own(optimizer):
        return None
    for name, value in vars(optimizer).items():
        if name == "step":
            continue  # its own, in the wrapper that a scheduler puts around it
        if name not in _usual() and not (_is_fixed(value) or _is_data(value)):
            return f"the optimizer keeps a {type(value).__name__} in its attribute {name!r}"
    other = next((key for key in optimizer.state if not isinstance(key, Tensor)), None)
    return None if other is None else f"the optimizer keeps {other!r} in its state"


@cache
def _usual() -> frozenset[str]:
    """The attributes of every optimizer."""
    return frozenset(vars(Optimizer([torch.nn.Parameter(torch.empty(0, device="cpu"))], {})))


def _is_fixed(value: object) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_fixed, value))
    return isinstance(value, _FIXED)


def _is_data(value: object) -> bool:
    """Whether it is a list, dictionary or set of what is fixed: copied, it can be compared."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return isinstance(value, list | set) and all(map(_is_fixed, value))


@dataclass(frozen=True)
class OnDevice:
    """What of a bucket is one number for all parameters, and stays on their device.

    Attributes:
        device: where it is.
        counts: the dtype of each 0-dim state.
        hyperparameters: likewise of each 0-dim tensor in the parameter group.
    """

    device: torch.device
    counts: Mapping[str, torch.dtype]
    hyperparameters: Mapping[str, torch.dtype]


class Shadow:
    """Stands for all parameters of a bucket.

    Attributes:
        optimizer: the real one.
        operands: tiny tensors: "param", "grad", and state; and what stays on the device, a
            hyperparameter under its name behind ``HYPERPARAMETER``.
        on_device: whether anything does.
        state: what the last step left as state.
        changes: what the last step changed in the parameter group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dtypes: Mapping[str, torch.dtype],
        shape: tuple[int, ...] = SHAPES[0],
        on_device: OnDevice | None = None,
    ) -> None:
        """Make it for ``optimizer``, with operands of ``dtypes`` and of ``shape``."""
        self.on_device = on_device is not None
        self._fake = _fake_mode() if self.on_device else nullcontext()
        place = torch.device("cpu") if on_device is None else on_device.device
        with self._fake:
            self.operands = {
                name: torch.ones(shape, dtype=dtype, device=place) for name, dtype in dtypes.items()
            }
            self.operands["param"] = torch.nn.Parameter(self.operands["param"])
            self.operands["param"].grad = self.operands["grad"]
            if on_device is not None:
                named = {HYPERPARAMETER + k: v for k, v in on_device.hyperparameters.items()}
                for name, dtype in (*on_device.counts.items(), *named.items()):
                    self.operands[name] = torch.ones((), dtype=dtype, device=place)
        self.state: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        self.optimizer = optimizer
        self._raw_step = raw_step(optimizer)
        self._is_foreign = not is_torchs_own(optimizer)
        self._stepping: Any = object.__new__(type(optimizer))
        # Dynamo is kept out of this one, which takes as long as four operations.
        init_group = getattr(type(optimizer), "_init_group", None)
        bare = getattr(init_group, "_torchdynamo_orig_callable", None)
        self._bound = {} if bare is None else {"_init_group": partial(bare, self._stepping)}

    def step(
        self,
        group: Mapping[str, Any],
        others: Mapping[str, Any],
        props: Mapping[str, Any] | None = None,
    ) -> None:
        """Run the optimizer's own step on the tiny parameter.

        Args:
            group: the parameter group, whose hyperparameters count.
            others: the state that is no operand; its 0-dim tensors are written to.
            props: what takes the place of ``operands``, if anything does.

        Raises:
            NotPointwiseError: the step changes an attribute of the optimizer or a tensor in the
                group, or keeps as state what is neither a tensor nor a number.
        """
        operands = self.operands if props is None else props
        param = operands["param"]
        in_group, in_optimizer = self._mutable(group) if self._is_foreign else ({}, {})
        plain = {name: False for name in ("foreach", "fused") if name in group}
        if self.on_device and "capturable" in group:
            plain["capturable"] = True
        start = len(HYPERPARAMETER)
        own = {k[start:]: v for k, v in operands.items() if k.startswith(HYPERPARAMETER)}
        given = {**group, **_copied(in_group), **plain, **own, "params": [param]}
        tiny = {
            k: v
            for k, v in operands.items()
            if k not in ("param", "grad") and not k.startswith(HYPERPARAMETER)
        }
        state = {**tiny, **others}
        attributes = {**vars(self.optimizer), **self._bound, **_copied(in_optimizer)}
        # Of torch's own: pickled optimizers lack it, and on a GPU the step would set it.
        attributes.setdefault(_WARNED, True)
        attributes["param_groups"] = [dict(given)]
        attributes["state"] = defaultdict(dict, {param: state} if state else {})
        self._stepping.__dict__ = dict(attributes)
        with torch.no_grad():
            self._raw_step(self._stepping)
        after = self._stepping.__dict__
        changed = [k for k in after if after[k] is not attributes.get(k)]
        if changed:
            raise NotPointwiseError(f"the step changes the optimizer's {changed[0]!r}")
        self.state = dict(after["state"][param])
        now = after["param_groups"][0]
        self.changes = {k: v for k, v in now.items() if v is not given.get(k)}
        if self._is_foreign:
            _check_state(after["state"], self.state)
            _check_unchanged(given, in_group, "in its parameter group")
            _check_unchanged(after, in_optimizer, "of the optimizer")

    @contextmanager
    def values(self) -> Iterator[None]:
        """Within it, nothing has values that stays on the device; otherwise all has.

        Raises:
            NotPointwiseError: what runs within needs them.
        """
        try:
            with self._fake:
                yield
        except (RuntimeError, AssertionError) as error:
            if not self.on_device:
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise NotPointwiseError(f"the step cannot stay on the device: {reason}") from error

    def _mutable(self, group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a step could change in place, in the group and in the optimizer's attributes."""
        attributes = vars(self.optimizer).items()
        return (
            {k: v for k, v in group.items() if k != "params" and not _is_fixed(v)},
            {k: v for k, v in attributes if k not in _usual() and _is_data(v)},
        )


def _fake_mode() -> AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # it takes a second to import

    return FakeTensorMode(allow_non_fake_inputs=True)  # such as numbers that torch makes tensors


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return deepcopy(values) if values else values


def _check_state(states: Mapping[Any, Any], state: Mapping[str, Any]) -> None:
    """See that what a step keeps can be kept for each parameter."""
    if len(states) > 1:
        raise NotPointwiseError("the step keeps state that is of no parameter")
    for name, value in state.items():
        if not isinstance(value, Tensor | StandIn | int | float | None):
            raise NotPointwiseError(f"the state {name!r} is a {type(value).__name__}")


def _check_unchanged(copies: Mapping[str, Any], originals: Mapping[str, Any], whose: str) -> None:
    for name, value in originals.items():
        same = copies[name] == value
        if not (same.all() if isinstance(same, Tensor) else same):
            raise NotPointwiseError(f"the step changes {name!r} {whose} in place")
