"""What each call that takes a variable float becomes, for ``lift_scalars``.

A rule is given the arguments of a call by the names of the operator's schema, and returns the call
that takes its place, or None where it does not know how: the number is another argument, or what
should be tensors is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import Graph, Node
from torch.torch_version import TorchVersion

from compileclip.passes import variable_floats as floats

ATEN = torch.ops.aten

# Whether AOTAutograd keeps a float variable that meets tensors in expressions alone.
_KEEPS_EXPRESSIONS = TorchVersion(torch.__version__) >= "2.13"

# Operators whose scalar argument scales what is added: an operand, a numerator or a factor.
_SCALED = {"add": "alpha", "sub": "alpha", "addcdiv": "value", "addcmul": "value"}


# Makes what replaces a node of the given target.
Rule = Callable[["Nodes", Any, dict[str, Any]], Node | None]


class Nodes:
    """Makes nodes before one node, with the metadata that Dynamo's own have."""

    def __init__(self, graph: Graph, before: Node) -> None:
        self.graph, self.before = graph, before
        self.made: list[Node] = []
        fake = next((v for n in graph.nodes if isinstance(v := floats.value(n), FakeTensor)), None)
        self.mode: AbstractContextManager[Any] = nullcontext() if fake is None else fake.fake_mode

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call of a function, or of a method by its name."""
        op = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(op, target, args, kwargs)
        self.made.append(node)
        if _is_in_place(target):
            node.meta["example_value"] = floats.value(self.before)
            return node
        args, kwargs = fx.map_arg((args, kwargs), floats.value)
        with self.mode:
            function = getattr(torch.Tensor, target) if isinstance(target, str) else target
            node.meta["example_value"] = function(*args, **kwargs)
        return node

    def erase(self) -> None:
        """Take all of them back."""
        for node in reversed(self.made):
            self.graph.erase_node(node)
        self.made.clear()

    def product(self, x: Node, scalar: Node) -> Node:
        """``x * scalar``, in which each float that ``scalar`` is computed from stays variable.

        torch 2.11 and 2.12 make a constant of a float that meets no tensor by itself, as ``s`` in
        ``x * -s`` or ``x * (1 - s)``. Taking 0 * s away leaves every value, zeros' signs too, where
        ``s`` is finite and at least 0, as hyperparameters are.
        """
        product = self(torch.mul, x, scalar)
        if _KEEPS_EXPRESSIONS:
            return product
        for leaf in _leaves(scalar):
            if leaf is not scalar:
                zero = self(torch.zeros, (), dtype=floats.value(product).dtype)
                product = self(torch.sub, product, self(torch.mul, zero, leaf))
        return product

    def cast(self, x: Node, *others: Node) -> Node:
        """``x`` in the dtype that an operator on it and ``others`` computes in."""
        dtype = reduce(torch.add, map(floats.value, (x, *others))).dtype
        return x if floats.value(x).dtype == dtype else self(torch.Tensor.to, x, dtype)

    def products(self, xs: Node | list[Node], scalar: Node) -> Node:
        """``xs * scalar``, of lists."""
        return self(torch._foreach_mul, xs, _shared(self.factors(xs, scalar)))

    def factors(self, xs: Node | list[Node], scalar: Node) -> list[Node]:
        """``scalar`` as a 0-dim tensor for each of ``xs``, the same one where that serves.

        The dtype is the one that torch computes a product with a number in: of two tensors without
        dimensions, the wider one would decide on that of the result.
        """
        values: Any = fx.map_arg(xs, floats.value)
        dtypes = [_scalar_dtype(x) for x in values]
        made = {
            dtype: self.product(self(torch.ones, (), dtype=dtype), scalar)
            for dtype in dict.fromkeys(dtypes)
        }
        return [made[dtype] for dtype in dtypes]


def _shared(factors: list[Node]) -> Node | list[Node]:
    """One tensor in place of a list of it, which ``_foreach_mul`` and ``_foreach_div`` take."""
    return factors[0] if len(set(factors)) == 1 else factors


def _is_in_place(target: Any) -> bool:
    return str(getattr(target, "__name__", target)).endswith("_")


def _scalar_dtype(x: torch.Tensor) -> torch.dtype:
    double = torch.result_type(x, 1.0) in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def _leaves(scalar: Node) -> dict[Node, None]:
    """The inputs that ``scalar`` is computed from, each once."""
    operands = [n for n in scalar.all_input_nodes if floats.symbols(n)]
    return {n: None for x in operands for n in _leaves(x)} if operands else {scalar: None}


def _are_tensors(*nodes: Any) -> bool:
    return all(isinstance(floats.value(n), torch.Tensor) for n in nodes)


def _are_lists(*lists: Any) -> bool:
    return all(isinstance(xs, list | tuple) and _are_tensors(*xs) for xs in lists)


def _scaled(keyword: str) -> Rule:
    def rule(nodes: Nodes, target: Any, given: dict[str, Any]) -> Node | None:
        """``x.add_(y, alpha=s)`` becomes ``x.add_(y * s)``."""
        scalar = given.pop(keyword, None)
        if not floats.is_variable(scalar) or not _are_tensors(*given.values()):
            return None
        x, y, *z = given.values()
        return nodes(target, x, nodes.product(nodes.cast(y, x, *z), scalar), *z)

    return rule


def _scaled_foreach(keyword: str) -> Rule:
    def rule(nodes: Nodes, target: Any, given: dict[str, Any]) -> Node | None:
        """``_foreach_add_(xs, ys, alpha=s)`` becomes ``_foreach_add_(xs, ys * s)``."""
        scalar = given.pop(keyword, None)
        if scalar is None and floats.is_variable(given.get("other")):
            xs, scalar = given.values()
            return nodes(target, xs, nodes.factors(xs, scalar)) if _are_lists(xs) else None
        if not floats.is_variable(scalar) or not _are_lists(*given.values()):
            return None
        xs, ys, *zs = given.values()
        ys = [nodes.cast(y, x, *z) for x, y, *z in zip(xs, ys, *zs, strict=True)]
        return nodes(target, xs, nodes.products(ys, scalar), *zs)

    return rule


def _foreach_by_scalar(nodes: Nodes, target: Any, given: dict[str, Any]) -> Node | None:
    """``_foreach_mul_(xs, s)`` becomes the same with 0-dim tensors."""
    xs, scalar = given.values()
    if not floats.is_variable(scalar) or not _are_lists(xs):
        return None
    return nodes(target, xs, _shared(nodes.factors(xs, scalar)))


def _fma(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``fma(x, s, y)``, which Dynamo makes of ``y.addcdiv_(a, b, value=s)``: ``x * s + y``."""
    x, scalar, y = given.values()
    if not floats.is_variable(scalar) or not _are_tensors(x, y):
        return None
    return nodes(torch.add, nodes.product(x, scalar), y)


def _mul(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``x * s``, which Dynamo of torch 2.11 makes of ``y.add_(x, alpha=s)`` and its like."""
    x, scalar = given.values()
    if floats.is_variable(x):
        x, scalar = scalar, x
    if _KEEPS_EXPRESSIONS or not floats.is_variable(scalar) or not _are_tensors(x):
        return None
    if scalar in _leaves(scalar):
        return None  # torch keeps it as it is
    return nodes.product(x, scalar)


def _lerp(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``x.lerp_(y, s)`` is ``x + (y - x) * s``."""
    x, y, scalar = given.values()
    if not floats.is_variable(scalar) or not _are_tensors(x, y):
        return None
    return nodes("add_", x, nodes.product(nodes(torch.sub, y, x), scalar))


def _foreach_lerp(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``_foreach_lerp_(xs, ys, s)``, whose weights Dynamo has made tensors up to torch 2.13."""
    xs, ys, scalar = given.values()
    if not floats.is_variable(scalar) or not _are_lists(xs, ys):
        return None
    differences = nodes(torch._foreach_sub, ys, xs)
    return nodes(torch._foreach_add_, xs, nodes.products(differences, scalar))


def _full_like(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``full_like(x, s)``, which Dynamo makes of the weights of ``_foreach_lerp_``."""
    x, scalar = given.pop("self"), given.pop("fill_value")
    if not floats.is_variable(scalar) or not _are_tensors(x):
        return None
    return nodes.product(nodes(torch.ones_like, x, **given), scalar)


def _power(nodes: Nodes, _: Any, given: dict[str, Any]) -> Node | None:
    """``s ** x``, the base made a tensor."""
    base, exponent = given.values()
    if not floats.is_variable(base) or not _are_tensors(exponent):
        return None
    return nodes(torch.pow, nodes.product(nodes(torch.ones_like, exponent), base), exponent)


def _foreach_power(nodes: Nodes, target: Any, given: dict[str, Any]) -> Node | None:
    """``_foreach_pow(s, xs)``, the base made a tensor for each exponent."""
    base, exponents = given.values()
    if not floats.is_variable(base) or not _are_lists(exponents):
        return None
    bases = [nodes.product(nodes(torch.ones_like, x), base) for x in exponents]
    return nodes(target, bases, exponents)


def _table() -> dict[Any, tuple[OpOverload | None, Rule]]:
    """Each target that a rule is for, with the overload whose schema names its arguments."""
    table: dict[Any, tuple[OpOverload | None, Rule]] = {
        "prims.fma.default": (None, _fma),  # by name: registered only when Dynamo needs it
        "lerp_": (ATEN.lerp_.Scalar, _lerp),
        torch.mul: (ATEN.mul.Tensor, _mul),
        operator.mul: (ATEN.mul.Tensor, _mul),
        torch.full_like: (ATEN.full_like.default, _full_like),
        operator.pow: (ATEN.pow.Scalar, _power),
        torch.pow: (ATEN.pow.Scalar, _power),
        torch._foreach_pow: (ATEN._foreach_pow.ScalarAndTensor, _foreach_power),
        torch._foreach_lerp_: (ATEN._foreach_lerp_.Scalar, _foreach_lerp),
    }
    for suffix in ("", "_"):
        for name in ("mul", "div"):
            name = f"_foreach_{name}{suffix}"
            table[getattr(torch, name)] = (getattr(ATEN, name).Scalar, _foreach_by_scalar)
        for name, keyword in _SCALED.items():
            overload, foreach = ("Tensor", "List") if keyword == "alpha" else ("default", "Scalar")
            method, function = f"{name}{suffix}", f"_foreach_{name}{suffix}"
            table[method] = (getattr(getattr(ATEN, method), overload), _scaled(keyword))
            found = getattr(getattr(ATEN, function), foreach)
            table[getattr(torch, function)] = (found, _scaled_foreach(keyword))
    return table


RULES = _table()
