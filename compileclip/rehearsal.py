"""The quickest way to learn a step's scalars: a step on objects that only compare and note.

Operations on real tensors cost a trip through torch's dispatcher each, even where nothing is
computed. A ``Prop`` is no tensor: its methods expect the recorded operations in their order, note
the numbers that they are given, and return the next prop. What a prop does not know ends the
rehearsal, and the step is replayed on the shadow's tensors instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compileclip.capture import SCALAR, Call, ChangedError, Recording
from compileclip.shadow import Shadow

# Functions and methods called otherwise than the operation that they come to.
_NAMES = {f"__{name}__": name for name in ("add", "sub", "mul", "neg", "abs", "pow")}
_NAMES |= {f"__i{name}__": f"{name}_" for name in ("add", "sub", "mul")}
_NAMES |= {"__truediv__": "div", "__itruediv__": "div_", "__rmul__": "mul", "__radd__": "add"}
# What a real float tensor returns of itself, without an operation.
_ITSELF = ("conj", "detach")
_FALSE = ("is_sparse", "is_complex", "is_cuda", "is_mkldnn", "is_meta")


class Prop:
    """Stands for one tensor of a recording."""

    def __init__(self, rehearsal: Rehearsal, number: int, tensor: Tensor) -> None:
        self._rehearsal, self._number, self._tensor = rehearsal, number, tensor
        self.grad: Prop | None = None

    def __getattr__(self, name: str) -> Any:
        if name in _ITSELF:
            return lambda: self
        if name in _FALSE:
            return False if name != "is_complex" else lambda: False
        if name in ("dtype", "device", "layout", "requires_grad"):
            return getattr(self._tensor, name)
        return self._rehearsal.method(self, name)

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other  # as torch does

    def __setitem__(self, mask: Any, value: Any) -> None:
        self._rehearsal.call("index_put_", (self, mask, value), {})

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
        return props[0]._rehearsal.call(func.__name__, args, kwargs or {})


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Prop, *args: Any) -> Any:
        return self._rehearsal.call(_NAMES[name], (self, *args), {})

    return method


for _name in _NAMES:
    setattr(Prop, _name, _operator(_name))


class Rehearsal:
    """Steps of a shadow that are expected to do what was recorded."""

    def __init__(self, shadow: Shadow, recording: Recording) -> None:
        self._shadow = shadow
        self._expected = [(_name_of(call), call) for call in recording.calls]
        tensors: dict[int, Tensor] = {}
        for name, number in recording.before.items():
            tensors[number] = shadow.tensors[name]
        for call, (_, out) in zip(recording.calls, recording.tensors, strict=True):
            tensors.setdefault(call.out, out)
        self._props = {number: Prop(self, number, t) for number, t in tensors.items()}
        self._before = {name: self._props[number] for name, number in recording.before.items()}
        self._before["param"].grad = self._before["grad"]
        self._after = {name: self._props[number] for name, number in recording.after.items()}
        self._methods: dict[tuple[int, str], Callable[..., Any]] = {}
        self._next = 0
        self._scalars: list[float] = []

    def run(self, group: Mapping[str, Any], others: Mapping[str, Any]) -> list[float]:
        """The scalars of this step.

        Raises:
            ChangedError: the step does something else, or something that props do not know.
        """
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
        return self._scalars

    def method(self, prop: Prop, name: str) -> Callable[..., Any]:
        """A bound method of ``prop`` for the operation ``name``."""
        key = (prop._number, name)
        if key not in self._methods:
            self._methods[key] = lambda *args, **kwargs: self.call(name, (prop, *args), kwargs)
        return self._methods[key]

    def call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prop:
        """Note the operation ``name``, which must be the next that is expected."""
        if self._next == len(self._expected):
            raise ChangedError
        expected, call = self._expected[self._next]
        if tuple(kwargs) != call.names:  # torch leaves out alpha=1 and value=1
            kwargs = {k: v for k, v in kwargs.items() if k in call.names or v != 1}
        leaves = (*args, *kwargs.values())
        if name != expected or len(leaves) != len(call.leaves) or tuple(kwargs) != call.names:
            raise ChangedError
        for leaf, kind in zip(leaves, call.leaves, strict=True):
            if kind is SCALAR:
                self._scalars.append(float(leaf))
            elif isinstance(leaf, Prop):
                if leaf._number != kind:
                    raise ChangedError
            elif isinstance(kind, int) or leaf != kind[0]:
                raise ChangedError
        self._next += 1
        return self._props[call.out]


def _name_of(call: Call) -> str:
    return call.func._schema.name.removeprefix("aten::")
