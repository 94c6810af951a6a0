"""Let hyperparameters be inputs of the compiled graph wherever the optimizer uses them.

Contract: in a graph that Dynamo captured, a call that takes a float computed from the graph's
inputs as ``alpha``, ``value``, weight or base becomes products of tensors with that float.

Why it is legal: ``add(x, y, alpha=s)`` is ``x + s * y``, ``addcdiv(x, y, z, value=s)`` is
``x + s * (y / z)``, ``lerp(x, y, s)`` is ``x + (y - x) * s`` by their definitions; a product may be
rounded once more than in a fused multiply-add, as wherever Inductor does not contract it.

Why it is worth it: AOTAutograd keeps a float input variable only where it multiplies or adds to one
tensor. Anywhere else it becomes a constant, and each new learning rate or beta another compilation.

Before::                                    After::

    param.add_(grad, alpha=neg)                 scaled = torch.mul(grad, neg)
                                                param.add_(scaled)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.torch_version import TorchVersion

# Makes what replaces a node that has a variable float among its inputs; None leaves the node.
Rule = Callable[[Graph, Node], "Node | None"]

# Whether AOTAutograd keeps a float variable that meets tensors in expressions alone.
_KEEPS_EXPRESSIONS = TorchVersion(torch.__version__) >= "2.13"

# Methods whose scalar argument scales what is added: an operand, a numerator or a factor.
_METHODS = {"add": "alpha", "sub": "alpha", "addcdiv": "value", "addcmul": "value"}


@dataclass(frozen=True)
class LiftScalars:
    """The pass; it has no fields."""

    def __call__(self, graph: Graph) -> int:
        """Rewrite ``graph`` in place and return the number of calls rewritten."""
        rewritten = 0
        for node in list(graph.nodes):
            operator_ = isinstance(node.target, OpOverload)
            rule = _RULES.get(str(node.target) if operator_ else node.target)
            if rule is None or not any(_is_variable_float(n) for n in node.all_input_nodes):
                continue
            with graph.inserting_before(node):
                replacement = rule(graph, node)
            if replacement is None:
                continue
            replacement.meta = dict(node.meta)  # shapes and dtypes are the same
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            rewritten += 1
        if rewritten:
            graph.lint()
        return rewritten


def _is_variable_float(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("example_value"), torch.SymFloat)


def _product(graph: Graph, x: Any, scalar: Any) -> Node:
    """``x * scalar``, in which each float that ``scalar`` is computed from stays variable.

    torch 2.11 and 2.12 make a constant of a float that meets no tensor by itself, as ``s`` in
    ``x * -s`` or ``x * (1 - s)``. Taking 0 * s away leaves every value, zeros' signs too, where
    ``s`` is finite and at least 0, as hyperparameters are.
    """
    product = graph.call_function(torch.mul, (x, scalar))
    if _KEEPS_EXPRESSIONS or not _is_variable_float(scalar):
        return product
    for leaf in _leaves(scalar):
        if leaf is not scalar:
            zero = graph.call_function(torch.zeros, ((),), {"dtype": torch.float64})
            product = graph.call_function(
                torch.sub, (product, graph.call_function(torch.mul, (zero, leaf)))
            )
    return product


def _leaves(scalar: Node) -> dict[Node, None]:
    """The inputs that ``scalar`` is computed from, each once."""
    operands = [n for n in scalar.all_input_nodes if _is_variable_float(n)]
    return {n: None for x in operands for n in _leaves(x)} if operands else {scalar: None}


def _as_tensor(graph: Graph, scalar: Node) -> Node:
    """``scalar`` as a 0-dim tensor, which foreach operators take in its place."""
    one = graph.call_function(torch.ones, ((),), {"dtype": torch.float64})
    return _product(graph, one, scalar)


def _scaled_method(keyword: str) -> Rule:
    def rule(graph: Graph, node: Node) -> Node | None:
        """``x.add_(y, alpha=s)`` becomes ``x.add_(y * s)``."""
        scalar = node.kwargs.get(keyword)
        if not _is_variable_float(scalar):
            return None
        scaled = _product(graph, node.args[1], scalar)
        return graph.call_method(str(node.target), (node.args[0], scaled, *node.args[2:]))

    return rule


def _scaled_foreach(keyword: str) -> Rule:
    def rule(graph: Graph, node: Node) -> Node | None:
        """``_foreach_add_(xs, ys, alpha=s)``; addcdiv and addcmul may have ``s`` last."""
        operands, scalar = list(node.args), node.kwargs.get(keyword)
        if scalar is None and keyword == "value" and len(operands) == 4:
            scalar = operands.pop()
        if not _is_variable_float(scalar):
            return _foreach_by_scalar(graph, node) if len(operands) == 2 else None
        scaled = graph.call_function(
            torch._foreach_mul, (operands[1], _as_tensor(graph, cast(Node, scalar)))
        )
        return graph.call_function(cast(Any, node.target), (operands[0], scaled, *operands[2:]))

    return rule


def _foreach_by_scalar(graph: Graph, node: Node) -> Node | None:
    """``_foreach_mul_(xs, s)`` becomes the same with a 0-dim tensor."""
    xs, scalar = node.args
    if not _is_variable_float(scalar):
        return None
    return graph.call_function(cast(Any, node.target), (xs, _as_tensor(graph, cast(Node, scalar))))


def _fma(graph: Graph, node: Node) -> Node | None:
    """``fma(x, s, y)``, which Dynamo makes of ``y.addcdiv_(a, b, value=s)``: ``x * s + y``."""
    x, scalar, y = node.args
    if not _is_variable_float(scalar):
        return None
    return graph.call_function(torch.add, (_product(graph, x, scalar), y))


def _mul(graph: Graph, node: Node) -> Node | None:
    """``x * s``, which Dynamo of torch 2.11 makes of ``y.add_(x, alpha=s)`` and its like."""
    x, scalar = node.args
    if _is_variable_float(x):
        x, scalar = scalar, x
    if _KEEPS_EXPRESSIONS or not _is_variable_float(scalar) or not isinstance(x, Node):
        return None
    is_tensor = isinstance(x.meta.get("example_value"), torch.Tensor)
    if not is_tensor or scalar in _leaves(cast(Node, scalar)):
        return None  # a product of two numbers, or one that torch keeps as it is
    return _product(graph, x, scalar)


def _lerp(graph: Graph, node: Node) -> Node | None:
    """``x.lerp_(y, s)`` is ``x + (y - x) * s``."""
    x, y, scalar = (*node.args, *node.kwargs.values())
    difference = graph.call_function(torch.sub, (y, x))
    return graph.call_method("add_", (x, _product(graph, difference, scalar)))


def _foreach_lerp(graph: Graph, node: Node) -> Node | None:
    """``_foreach_lerp_(xs, ys, s)``, whose weights Dynamo has made tensors up to torch 2.13."""
    xs, ys, scalar = (*node.args, *node.kwargs.values())
    if not _is_variable_float(scalar):
        return None
    differences = graph.call_function(torch._foreach_sub, (ys, xs))
    factor = _as_tensor(graph, cast(Node, scalar))
    scaled = graph.call_function(torch._foreach_mul, (differences, factor))
    return graph.call_function(torch._foreach_add_, (xs, scaled))


def _full_like(graph: Graph, node: Node) -> Node | None:
    """``full_like(x, s)``, which Dynamo makes of the weights of ``_foreach_lerp_``."""
    x, scalar = node.args
    return _product(graph, graph.call_function(torch.ones_like, (x,)), scalar)


def _power(graph: Graph, node: Node) -> Node | None:
    """``s ** x``, the base made a tensor."""
    base, exponent = node.args
    if not _is_variable_float(base) or not isinstance(exponent, Node):
        return None
    ones = graph.call_function(torch.ones_like, (exponent,))
    return graph.call_function(torch.pow, (_product(graph, ones, base), exponent))


def _foreach_power(graph: Graph, node: Node) -> Node | None:
    """``_foreach_pow(s, xs)``, the base made a tensor for each exponent."""
    base, exponents = node.args
    if not _is_variable_float(base) or not isinstance(exponents, list | tuple):
        return None
    ones = [graph.call_function(torch.ones_like, (cast(Node, x),)) for x in exponents]
    bases = [_product(graph, one, base) for one in ones]
    return graph.call_function(torch._foreach_pow, (bases, exponents))


_RULES: dict[Any, Rule] = {
    "prims.fma.default": _fma,  # by name: it is registered only when Dynamo needs it
    "lerp_": _lerp,
    torch.mul: _mul,
    operator.mul: _mul,
    torch.full_like: _full_like,
    operator.pow: _power,
    torch.pow: _power,
    torch._foreach_pow: _foreach_power,
    torch._foreach_lerp_: _foreach_lerp,
    torch._foreach_mul: _foreach_by_scalar,
    torch._foreach_mul_: _foreach_by_scalar,
    torch._foreach_div: _foreach_by_scalar,
    torch._foreach_div_: _foreach_by_scalar,
    **{
        f"{name}{suffix}": _scaled_method(keyword)
        for name, keyword in _METHODS.items()
        for suffix in ("", "_")
    },
    **{
        getattr(torch, f"_foreach_{name}{suffix}"): _scaled_foreach(keyword)
        for name, keyword in _METHODS.items()
        for suffix in ("", "_")
    },
}
