"""The quickest way to learn a step's scalars: a step on objects that only compare and note.

Operations on real tensors cost a trip through torch's dispatcher each, even where nothing is
computed. A ``Prop`` is no tensor: its methods expect the recorded operations in their order, note
the numbers that they are given, and return the next prop. What a prop does not know ends the
rehearsal, and the step is replayed on the shadow's tensors instead.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compileclip.recording.recorder import SCALAR, Call, Recording
from compileclip.recording.shadow import ChangedError, Shadow, StandIn

# Functions and methods called otherwise than the operation that they come to.
_NAMES = {f"__{name}__": name for name in ("add", "sub", "mul", "neg", "abs", "pow")}
_NAMES |= {f"__i{name}__": f"{name}_" for name in ("add", "sub", "mul")}
_NAMES |= {"__truediv__": "div", "__itruediv__": "div_", "__rmul__": "mul", "__radd__": "add"}
_NAMES |= {f"__{name}__": name for name in ("rsub", "lt", "le", "gt", "ge")}
_NAMES |= {f"__{name}__": f"bitwise_{name}" for name in ("and", "or", "xor")}
_NAMES |= {"__invert__": "bitwise_not"}
# What a real float tensor returns of itself, without an operation.
_ITSELF = ("conj", "detach")
_FALSE = ("is_sparse", "is_complex", "is_mkldnn", "is_meta")


class Prop(StandIn):
    """Stands for one tensor of a recording."""

    @staticmethod
    def of(rehearsal: ScalarTrace, tensor: Tensor) -> Prop:
        """What stands for ``tensor``."""
        return (_Count if tensor.dim() == 0 else Prop)(rehearsal, tensor)

    def __init__(self, rehearsal: ScalarTrace, tensor: Tensor) -> None:
        self._trace, self._tensor = rehearsal, tensor
        self.grad: Prop | None = None

    def __getattr__(self, name: str) -> Any:
        if name in _ITSELF:
            return lambda: self
        if name in _FALSE:
            return False if name != "is_complex" else lambda: False
        if name in ("dtype", "device", "layout", "requires_grad", "is_cuda"):
            self.__dict__[name] = value = getattr(self._tensor, name)
            return value
        method = functools.partial(self._trace.call, name, self)
        self.__dict__[name] = method  # found without this function from now on
        return method

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other  # as torch does

    def __rpow__(self, base: Any) -> Any:
        return self._trace.call("pow", base, self)

    def __setitem__(self, mask: Any, value: Any) -> None:
        self._trace.call("index_put_", self, mask, value)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.is_complex:
            return False
        props = [a for a in args if isinstance(a, Prop)]
        if not props:
            raise ChangedError
        return props[0]._trace.call(func.__name__, *args, **(kwargs or {}))


class _Count(Prop):
    # What torch's optimizers ask of step counts by isinstance.
    __class__ = property(lambda self: Tensor)


def _operator(name: str) -> Callable[..., Any]:
    operation = _NAMES[name]

    def method(self: Prop, *args: Any) -> Any:
        return self._trace.call(operation, self, *args)

    return method


for _name in _NAMES:
    setattr(Prop, _name, _operator(_name))


class ScalarTrace:
    """Steps of a shadow that are expected to do what was recorded."""

    def __init__(self, shadow: Shadow, recording: Recording) -> None:
        # Props are in a cycle, which is not to keep an optimizer until that is collected.
        self._shadow = weakref.proxy(shadow)
        tensors: dict[int, Tensor] = {}
        for name, number in recording.before.items():
            tensors[number] = shadow.operands[name]
        for call, (_, out) in zip(recording.calls, recording.tensors, strict=True):
            tensors.setdefault(call.out, out)
        props = {number: Prop.of(self, t) for number, t in tensors.items()}
        self._expected = [
            (_name_of(call), call.names, _expected(call, props), props[call.out])
            for call in recording.calls
        ]
        self._before = {name: props[number] for name, number in recording.before.items()}
        self._before["param"].grad = self._before["grad"]
        self._after = {name: props[number] for name, number in recording.after.items()}
        self._next = 0
        self._scalars: list[Any] = []

    def run(self, group: Mapping[str, Any], others: Mapping[str, Any]) -> list[float]:
        """The scalars of this step.

        Raises:
            ChangedError: the step does something else, or something that props do not know.
        """
        scalars = self.trace(group, others)
        try:
            return [float(s) for s in scalars]
        except (TypeError, OverflowError) as error:  # of what is complex, or too large an int
            raise ChangedError from error

    def trace(self, group: Mapping[str, Any], others: Mapping[str, Any]) -> list[Any]:
        """As ``run``, with the scalars as the step gave them."""
        self._next, self._scalars = 0, []
        try:
            self._shadow.step(group, others, self._before)
        except ChangedError:
            raise
        except Exception as error:  # code that asks for a real tensor
            raise ChangedError from error
        state = self._shadow.state
        if self._next < len(self._expected) or any(
            isinstance(v, Prop) and v is not self._after.get(k) for k, v in state.items()
        ):
            raise ChangedError
        found, self._scalars = self._scalars, []
        return found

    def changes_nothing_but(self, others: Mapping[str, Any]) -> bool:
        """Whether the last run left group and state as they were, but for ``others`` in place."""
        state, known = self._shadow.state, {**self._before, **others}
        same = all(state.get(name) is value for name, value in others.items())
        return same and state.keys() <= known.keys() and not self._shadow.changes

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Prop:
        """Note the operation ``name``, which must be the next that is expected."""
        if self._next == len(self._expected):
            raise ChangedError
        expected, names, leaves, out = self._expected[self._next]
        if tuple(kwargs) != names:  # torch leaves out alpha=1 and value=1
            kwargs = {k: v for k, v in kwargs.items() if k in names or v != 1}
        given = (*args, *kwargs.values()) if kwargs else args
        if name != expected or len(given) != len(leaves) or tuple(kwargs) != names:
            raise ChangedError
        for leaf, wanted in zip(given, leaves, strict=True):
            if leaf is wanted:  # a prop
                continue
            if wanted is SCALAR:
                self._scalars.append(leaf)
            elif type(wanted) is not tuple or isinstance(leaf, Prop) or leaf != wanted[0]:
                raise ChangedError
        self._next += 1
        return out


def _expected(call: Call, props: Mapping[int, Prop]) -> list[Any]:
    """What ``call`` is to be given: props, ``SCALAR``, and ``(value,)`` for constants."""
    return [props[leaf] if isinstance(leaf, int) else leaf for leaf in call.leaves]


def _name_of(call: Call) -> str:
    return call.func._schema.name.removeprefix("aten::")
