"""The scalars of a step as one function of hyperparameters and step counts.

A rehearsal whose numbers are FX proxies shows what is computed of them. Without the optimizer's
Python around it, that takes a tenth of the time. What decides a branch is computed along and has
to come out as it did.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Graph, Node, Proxy

from compileclip.recording.scalar_trace import ScalarTrace
from compileclip.recording.shadow import ChangedError, StandIn

_NUMBERS = (float, int)  # and nothing derived from them: a bool is a decision
_NOTHING: Any = ((), None, ())  # no decisions are like that


class Formula:
    """The scalars that a rehearsal finds, without the rehearsal.

    Holds for optimizers whose step depends on nothing but their parameter group and state.

    Attributes:
        names: of the counts.

    Raises:
        ChangedError: the rehearsal fails, or what the step computes cannot be seen.
    """

    def __init__(
        self, rehearsal: ScalarTrace, group: Mapping[str, Any], others: Mapping[str, Any]
    ) -> None:
        """Trace ``rehearsal``.

        Args:
            rehearsal: of the step.
            group: the parameter group.
            others: the state that is no operand.
        """
        expected = kinds(group)
        tracer = _Tracer(group, others)
        found = rehearsal.trace(tracer.group, tracer.counts)
        if not rehearsal.changes_nothing_but(tracer.counts):
            raise ChangedError
        self.names = list(others)
        self._compute, self._decisions = tracer.finish(found)
        self._is_alike = _compiled(_test_of(expected), "is_alike", (), ())

    def run(
        self, group: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[list[float], dict[str, float]]:
        """The scalars of this step, and what ``others`` are after it.

        Args:
            group: the parameter group.
            others: the values of the state that is no operand.

        Raises:
            ChangedError: the step is another.
        """
        scalars, counts = self.find(group, others)
        try:
            return [float(s) for s in scalars], dict(zip(self.names, counts, strict=True))
        except (TypeError, OverflowError) as error:  # of what is complex, or too large an int
            raise ChangedError from error

    def find(
        self, group: Mapping[str, Any], others: Mapping[str, Any]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As ``run``, in less time; the latter in the order of ``names``."""
        try:
            alike = self._is_alike(group)
            scalars, decisions, counts = self._compute(None, group, others) if alike else _NOTHING
        except Exception as error:  # of arithmetic, which the step itself will raise, or not
            raise ChangedError from error
        if decisions != self._decisions:
            raise ChangedError
        return scalars, counts


def _test_of(expected: Sequence[tuple[str, Any]]) -> str:
    """The Python source of a function that tells whether a group has the kinds ``expected``."""
    tests = [_test(f"group[{name!r}]", kind) for name, kind in expected]
    whole = " and ".join([f"len(group) == {len(expected) + 1}", *tests])
    return f"def is_alike(group):\n    return {whole}\n"


def _test(value: str, kind: Any) -> str:
    if isinstance(kind, type):
        return f"type({value}) is {kind.__name__}"
    if isinstance(kind, tuple):
        parts = [_test(f"{value}[{i}]", part) for i, part in enumerate(kind)]
        return " and ".join([f"type({value}) is tuple and len({value}) == {len(kind)}", *parts])
    if isinstance(kind, str):
        return f"type({value}) is str and {value} == {kind!r}"
    return f"{value} is {kind!r}"  # None, True or False


def kinds(group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What must not change of a parameter group for a formula to hold, by name.

    Raises:
        ChangedError: the group holds what there is no formula of.
    """
    if any(type(name) is not str for name in group):  # others may not be what Python reads
        raise ChangedError
    return tuple((name, _kind(value)) for name, value in group.items() if name != "params")


def _kind(value: Any) -> Any:
    """What must not change of an entry of a group: of numbers the type, else the value."""
    if type(value) in _NUMBERS:
        return type(value)
    if type(value) is tuple:
        return tuple(map(_kind, value))
    if value is None or type(value) in (bool, str):
        return value
    raise ChangedError


class _Count(Proxy):
    """A 0-dim tensor on a CPU, as its value: it is computed with as the tensor would be."""

    # What torch's optimizers ask by isinstance.
    __class__ = property(lambda self: Tensor)

    def __init__(self, value: Proxy, tensor: Tensor) -> None:
        if tensor.dtype not in _ROUND:
            raise ChangedError
        super().__init__(value.node, value.tracer)
        self._value, self._round = value, _ROUND[tensor.dtype]

    def __iadd__(self, other: Any) -> _Count:
        return self._set(self._value + self._rounded(other))

    def __imul__(self, other: Any) -> _Count:
        return self._set(self._value * self._rounded(other))

    def item(self) -> Proxy:
        return self._value

    def _set(self, value: Proxy) -> _Count:
        # In double precision and then rounded, a sum or product of two floats is the float one:
        # S. A. Figueroa, When is double rounding innocuous?, SIGNUM Newsletter 30 (1995).
        self._value = self._rounded(value)
        self.node = self._value.node
        return self

    def _rounded(self, value: Any) -> Any:
        return self.tracer.create_proxy("call_function", self._round, (value,), {})

    def __getattr__(self, name: str) -> Any:
        raise ChangedError  # what else a tensor does is not seen


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


_ROUND: dict[torch.dtype, Callable[[float], float]] = {
    torch.float32: _float32,
    torch.float64: float,
}


class _Tracer(fx.proxy.TracerBase):
    """Keeps each node's value, so that Python can take the branches that it takes."""

    def __init__(self, group: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        if not all(isinstance(value, Tensor) for value in others.values()):
            raise ChangedError
        counts = {name: value.item() for name, value in others.items()}
        whole = [self._given(name, value) for name, value in (("group", group), ("counts", counts))]
        self._decisions: list[tuple[Node, bool]] = []
        numbers = {name: value for name, value in group.items() if name != "params"}
        self.group = {name: self._part(whole[0], name, value) for name, value in numbers.items()}
        self.counts = {k: _Count(self._item(whole[1], k), v) for k, v in others.items()}

    def _given(self, name: str, value: Any) -> Proxy:
        node = self.graph.placeholder(name)
        node.meta["value"] = value
        return Proxy(node, self)

    def _part(self, whole: Proxy, key: Any, value: Any) -> Any:
        """``value``, which is ``whole[key]``, with proxies for its numbers."""
        if type(value) is tuple:
            part = self._item(whole, key)
            return tuple(self._part(part, i, v) for i, v in enumerate(value))
        return self._item(whole, key) if type(value) in _NUMBERS else value

    def _item(self, whole: Proxy, key: Any) -> Proxy:
        item: Proxy = self.create_proxy("call_function", operator.getitem, (whole, key), {})
        return item

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any
    ) -> Any:
        """A proxy for a node whose value is computed at once."""
        if any(isinstance(a, StandIn) for a in args):
            return NotImplemented  # an operator, which the tensor's stand-in knows
        if kind != "call_function":
            raise ChangedError
        nodes: Any = self.create_arg((args, kwargs))
        node = self.graph.call_function(target, *nodes)
        values, named = fx.map_arg(nodes, lambda n: n.meta["value"])
        node.meta["value"] = target(*values, **named)
        return Proxy(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """What ``obj`` decides."""
        found = bool(obj.node.meta["value"])
        node = self.graph.call_function(operator.truth, (obj.node,))
        self._decisions.append((node, found))
        return found

    def finish(self, scalars: list[Any]) -> tuple[Any, tuple[bool, ...]]:
        """The function of a group and counts, and what it has to decide."""
        decisions = tuple(node for node, _ in self._decisions)
        counts = tuple(count.item().node for count in self.counts.values())
        self.graph.output((self.create_arg(tuple(scalars)), decisions, counts))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        code = self.graph.python_code("self")
        for node in self.graph.nodes:  # in a cycle, which is not to keep the parameters
            node.meta.clear()
        names = tuple(sorted(code.globals))
        values = tuple(code.globals[name] for name in names)
        compute = _compiled(code.src, "forward", names, values)
        return compute, tuple(found for _, found in self._decisions)


@functools.lru_cache(maxsize=256)
def _compiled(
    source: str, name: str, names: tuple[str, ...], values: tuple[Any, ...]
) -> Callable[..., Any]:
    """A function of a source; a module of each graph would stay in a cache of torch's."""
    found: dict[str, Any] = dict(zip(names, values, strict=True))
    exec(source, found)  # as fx.GraphModule does
    function: Callable[..., Any] = found[name]
    return function
