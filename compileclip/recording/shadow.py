"""What steps in the place of a bucket's parameters, to show what the step is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager.optimizer_state import raw_step
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.recording import optimizer_attributes

SHAPES = ((2, 3), (5,))  # a step is the same for both, or refused
_WARNED = "_warned_capturable_if_run_uncaptured"
HYPERPARAMETER = "group."  # before the name of one that is an operand


class NotPointwiseError(ValueError):
    """A step cannot become a program; the message says why."""


class ChangedError(Exception):
    """A step does not do what the one before did."""


def failed(error: Exception) -> NotPointwiseError:
    """The reason where a stand-in cannot do what the step itself may do."""
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    return NotPointwiseError(f"the step fails in a parameter's place ({what})")


class StandIn:
    """What takes the place of a tensor in a step."""


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
        is_foreign: whether the class of the optimizer is not torch's.
        state: what the last step left as state.
        has_state: whether the last step left any, be it empty.
        changes: what the last step changed in the parameter group.
        elsewhere: what it changed in other groups, by their index. torch's own steps do not look
            at these; another class finds them here, without parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dtypes: Mapping[str, torch.dtype],
        shape: tuple[int, ...] = SHAPES[0],
        on_device: OnDevice | None = None,
        index: int = 0,
        like: Tensor | None = None,
    ) -> None:
        """Make it.

        Args:
            optimizer: the real one.
            dtypes: of the operands.
            shape: of the operands.
            on_device: what stays on a device.
            index: of the parameter group.
            like: a parameter of this shape, whose attributes count; there are no numbers then.
        """
        self.on_device = on_device is not None
        self._fake = _fake_mode() if self.on_device else nullcontext()
        place = torch.device("cpu" if like is None else "meta")
        place = place if on_device is None else on_device.device
        with self._fake:
            self.operands = {
                name: torch.ones(shape, dtype=dtype, device=place) for name, dtype in dtypes.items()
            }
            self.operands["param"] = _parameter(self.operands["param"], self.operands["grad"])
            if like is not None:
                self.operands["param"].requires_grad_(like.requires_grad)
                vars(self.operands["param"]).update(vars(like))
            if on_device is not None:
                named = {HYPERPARAMETER + k: v for k, v in on_device.hyperparameters.items()}
                for name, dtype in (*on_device.counts.items(), *named.items()):
                    self.operands[name] = torch.ones((), dtype=dtype, device=place)
        self.state: dict[str, Any] = {}
        self.has_state = False
        self.changes: dict[str, Any] = {}
        self.elsewhere: dict[int, dict[str, Any]] = {}
        self.optimizer, self.index = optimizer, index
        self._raw_step = raw_step(optimizer)
        self.is_foreign = not is_torchs_own(optimizer)
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
        plain = {name: False for name in ("foreach", "fused") if name in group}
        if self.on_device and "capturable" in group:
            plain["capturable"] = True
        start = len(HYPERPARAMETER)
        own = {k[start:]: v for k, v in operands.items() if k.startswith(HYPERPARAMETER)}
        given = {**group, **plain, **own, "params": [param]}
        tiny = {
            k: v
            for k, v in operands.items()
            if k not in ("param", "grad") and not k.startswith(HYPERPARAMETER)
        }
        state = {**tiny, **others}
        attributes = {**vars(self.optimizer), **self._bound, "state": defaultdict(dict)}
        # Of torch's own: pickled optimizers lack it, and on a GPU the step would set it.
        attributes.setdefault(_WARNED, True)
        if state:
            attributes["state"][param] = state
        if self.is_foreign:
            self._step_foreign(given, attributes)
        else:
            self.elsewhere, self.changes = {}, self._step(given, attributes)
        self.has_state = param in attributes["state"]
        self.state = dict(attributes["state"][param])
        if self.is_foreign:
            _check_state(attributes["state"], self.state)

    def _step(self, given: dict[str, Any], attributes: dict[str, Any]) -> dict[str, Any]:
        """Step with one group, ``given``; return what has changed in it."""
        attributes["param_groups"] = [dict(given)]
        self._run(attributes)
        return _changes(attributes["param_groups"][0], given)

    def step_all(self, groups: list[dict[str, Any]], state: Any) -> dict[int, dict[str, Any]]:
        """Run the optimizer's own step on other groups and another state than its own.

        Returns:
            What it changed in groups, by their index.
        """
        plain = {"foreach": False, "fused": False}
        groups = [{**g, **{k: v for k, v in plain.items() if k in g}} for g in groups]
        attributes = {**vars(self.optimizer), **self._bound, "state": state}
        return self._step_groups(groups, attributes)

    def _step_foreign(self, given: dict[str, Any], attributes: dict[str, Any]) -> None:
        """Step with all groups, of which the others have no parameters."""
        groups = [{**group, "params": []} for group in self.optimizer.param_groups]
        groups[self.index] = given
        found = self._step_groups(groups, attributes)
        self.changes = found.pop(self.index, {})
        self.elsewhere = found

    def _step_groups(
        self, groups: list[dict[str, Any]], attributes: dict[str, Any]
    ) -> dict[int, dict[str, Any]]:
        """Step with ``groups``; return what has changed in them, which may not be in place."""
        shared = [
            {k: v for k, v in g.items() if k != "params" and not optimizer_attributes.is_fixed(v)}
            for g in groups
        ]
        for name, value in chain.from_iterable(own.items() for own in shared):
            if not isinstance(value, Tensor | StandIn) and not optimizer_attributes.is_data(value):
                what = type(value).__name__
                raise NotPointwiseError(f"a parameter group keeps a {what} in {name!r}")
        own = {
            k: v
            for k, v in attributes.items()
            if k not in optimizer_attributes.usual() or k == "defaults"
        }
        data = {k: v for k, v in own.items() if optimizer_attributes.is_data(v)}
        groups = [
            {**g, **optimizer_attributes.copied(own)} for g, own in zip(groups, shared, strict=True)
        ]
        attributes |= {
            **optimizer_attributes.copied(data),
            "param_groups": [dict(group) for group in groups],
        }
        self._run(attributes)
        after = attributes["param_groups"]
        if len(after) != len(groups):
            raise NotPointwiseError("the step changes the number of parameter groups")
        for group, own in zip(groups, shared, strict=True):
            _check_unchanged(group, own, "in its parameter group")
        _check_unchanged(attributes, data, "of the optimizer")
        found = {i: _changes(after[i], before) for i, before in enumerate(groups)}
        return {i: changes for i, changes in found.items() if changes}

    def _run(self, attributes: dict[str, Any]) -> None:
        """Run the step of an optimizer of these ``attributes``, which it may not change."""
        self._stepping.__dict__ = dict(attributes)
        try:
            with torch.no_grad():
                self._raw_step(self._stepping)
        except (ChangedError, NotPointwiseError):
            raise
        except Exception as error:
            if self.on_device:  # ``values`` knows more of it
                raise
            raise failed(error) from error
        # What it holds is let go again, for the object is one of a cycle.
        after, self._stepping.__dict__ = self._stepping.__dict__, {}
        changed = [k for k in after if after[k] is not attributes.get(k)]
        if changed:
            raise NotPointwiseError(f"the step changes the optimizer's {changed[0]!r}")

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


def _fake_mode() -> AbstractContextManager[Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode  # it takes a second to import

    return FakeTensorMode(allow_non_fake_inputs=True)  # such as numbers that torch makes tensors


def _parameter(tensor: Tensor, grad: Tensor) -> Tensor:
    """A parameter with a gradient, which may have another dtype."""
    param = torch.nn.Parameter(tensor)
    if grad.dtype != tensor.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad
    return param


def _changes(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What is new in a parameter group, or another object than before."""
    return {k: v for k, v in after.items() if v is not before.get(k)}


def _check_state(states: Mapping[Any, Any], state: Mapping[str, Any]) -> None:
    """See that what a step keeps can be kept for each parameter."""
    if len(states) > 1:
        raise NotPointwiseError("the step keeps state that is of no parameter")
    for name, value in state.items():
        if not isinstance(value, Tensor | StandIn | int | float | None):
            raise NotPointwiseError(f"the state {name!r} is a {type(value).__name__}")


def _check_unchanged(copies: Mapping[str, Any], originals: Mapping[str, Any], whose: str) -> None:
    name = optimizer_attributes.unlike(copies, originals)
    if name is not None:
        raise NotPointwiseError(f"the step changes {name!r} {whose} in place")
