"""The scalars of a step as one function of hyperparameters and step counts.

A rehearsal whose numbers are FX proxies shows what is computed of them. Without the optimizer's
Python around it, that takes a tenth of the time. What decides a branch is computed along and has
to come out as it did.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Graph, GraphModule, Node, Proxy

from compileclip.capture import ChangedError
from compileclip.rehearsal import Rehearsal
from compileclip.shadow import StandIn

_NUMBERS = (float, int)  # and nothing derived from them: a bool is a decision


class Formula:
    """The scalars that a rehearsal finds, without the rehearsal.

    Holds for optimizers whose step depends on nothing but their parameter group and state.

    Raises:
        ChangedError: the rehearsal fails, or what the step computes cannot be seen.
    """

    def __init__(
        self, rehearsal: Rehearsal, group: Mapping[str, Any], others: Mapping[str, Any]
    ) -> None:
        """Trace ``rehearsal``.

        Args:
            rehearsal: of the step.
            group: the parameter group.
            others: the state that is no operand; it is left as it is.
        """
        self._kinds = {name: _kind(value) for name, value in group.items() if name != "params"}
        tracer = _Tracer(group, {name: _copied(value) for name, value in others.items()})
        found = rehearsal.trace(tracer.group, tracer.others)
        if not rehearsal.changes_nothing_but(tracer.others):
            raise ChangedError
        self._compute, self._decisions = tracer.finish(found)

    def run(self, group: Mapping[str, Any], others: Mapping[str, Any]) -> list[float]:
        """The scalars of this step.

        Args:
            group: the parameter group.
            others: the state that is no operand; its 0-dim tensors are advanced.

        Raises:
            ChangedError: the step is another.
        """
        if len(group) != len(self._kinds) + 1:
            raise ChangedError
        for name, kind in self._kinds.items():
            value = group.get(name, self)  # which is none of the kinds
            if not (type(value) is kind or value is kind or _kind(value) == kind):
                raise ChangedError
        try:
            scalars, decisions = self._compute(group, others)
        except Exception as error:  # of arithmetic, which the step itself will raise, or not
            raise ChangedError from error
        if decisions != self._decisions:
            raise ChangedError
        return [float(s) for s in scalars]


def _kind(value: Any) -> Any:
    """What must not change of an entry of a group: of numbers the type, else the value."""
    if type(value) in _NUMBERS:
        return type(value)
    if type(value) is tuple:
        return tuple(map(_kind, value))
    if value is None or type(value) in (bool, str):
        return value
    raise ChangedError


def _copied(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ChangedError
    return value.clone()


class _Count(Proxy):
    """A 0-dim tensor, which advances in place."""

    # What torch's optimizers ask by isinstance.
    __class__ = property(lambda self: Tensor)

    def __iadd__(self, other: Any) -> Proxy:
        return self._in_place("add_", other)

    def __imul__(self, other: Any) -> Proxy:
        return self._in_place("mul_", other)

    def _in_place(self, name: str, other: Any) -> Proxy:
        self.tracer.create_proxy("call_method", name, (self, other), {})
        return self

    def item(self) -> Proxy:
        return self.tracer.create_proxy("call_method", "item", (self,), {})

    def __getattr__(self, name: str) -> Any:
        raise ChangedError  # what else a tensor does is not seen


class _Tracer(fx.proxy.TracerBase):
    """Keeps each node's value, so that Python can take the branches that it takes."""

    def __init__(self, group: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.graph = Graph()
        whole = [self._given(name, value) for name, value in (("group", group), ("others", others))]
        self._decisions: list[tuple[Node, bool]] = []
        self.group = {name: self._part(whole[0], name, value) for name, value in group.items()}
        self.others = {name: _Count(self._item(whole[1], name).node, self) for name in others}

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
        nodes: Any = self.create_arg((args, kwargs))
        node = self.graph.create_node(kind, target, *nodes)
        values, named = fx.map_arg(nodes, lambda n: n.meta["value"])
        function = getattr(values[0], target) if kind == "call_method" else target
        given = values[1:] if kind == "call_method" else values
        node.meta["value"] = function(*given, **named)
        return Proxy(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """What ``obj`` decides."""
        found = bool(obj.node.meta["value"])
        node = self.graph.call_function(operator.truth, (obj.node,))
        self._decisions.append((node, found))
        return found

    def finish(self, scalars: list[Any]) -> tuple[Any, tuple[bool, ...]]:
        """The function of a group and counts, and what it has to decide."""
        nodes = tuple(node for node, _ in self._decisions)
        self.graph.output((self.create_arg(tuple(scalars)), nodes))
        self.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output", "call_method"))
        self.graph.lint()
        module = GraphModule(torch.nn.Module(), self.graph)
        return module.forward, tuple(found for _, found in self._decisions)
