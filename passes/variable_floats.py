"""The floats of a captured graph that vary from call to call: who uses them, who may keep them so.

Dynamo makes a float that varies a 0-dim tensor, takes its ``item()``, and captures what the code
computes of that as nodes of their own. A pass of AOTAutograd (``tensorify_python_scalars``) does
the computation in tensors wherever it meets a tensor in one of a few operators. Any other use makes
the float a constant: right where all of its uses do so, and torch then compiles for each value.

With uses of both kinds in one graph, torch 2.13 keeps the input, bakes its value in beside it, and
guards that. But AOTAutograd's cache knows the graph by the input alone, and a hit adds no guard:
the next value is given the code of the first. So such a float has to be a constant of the graph.

Private parts of torch used here, read in torch 2.11 to 2.13: ``free_symbols``, ``symbol_is_type``,
``sympy_interp`` and ``TensorReferenceAnalysis``, by which that pass computes expressions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import TensorReferenceAnalysis
from torch.utils._sympy.symbol import SymT, symbol_is_type

Symbols: TypeAlias = frozenset[Any]  # of sympy.Symbol, which has no types

_SYMBOLIC = (torch.SymFloat, torch.SymInt, torch.SymBool)
_FLOATS = (SymT.FLOAT, SymT.UNBACKED_FLOAT)  # given to the graph; read from a tensor within it
_SCALAR = (*_SYMBOLIC, float, int, bool)

# What torch computes in tensors where a float variable is one of the two operands.
_ARITHMETIC = ("mul", "multiply", "add", "sub", "subtract", "div", "divide", "true_divide")
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
_OPERATORS = ("mul", "add", "sub", "truediv", "imul", "iadd", "isub", "itruediv", *_COMPARISONS)
_KEPT: frozenset[Any] = frozenset(
    [getattr(torch, name) for name in (*_ARITHMETIC, *_COMPARISONS, "rsub")]
    + [getattr(operator, name) for name in _OPERATORS]
    + [f"{name}{suffix}" for name in (*_ARITHMETIC, *_COMPARISONS) for suffix in ("", "_")]
)


def value(node: Any) -> Any:
    """What Dynamo says that ``node`` stands for; None where it does not."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def symbols(node: Any) -> Symbols:
    """The variable floats that the number which ``node`` stands for is computed from."""
    number = value(node)
    if not isinstance(number, _SYMBOLIC):
        return frozenset()
    return frozenset(s for s in free_symbols(number) if symbol_is_type(s, _FLOATS))


def is_variable(node: Any) -> bool:
    """Whether ``node`` is a float that varies and that torch can compute in tensors."""
    number = value(node)
    if not isinstance(number, torch.SymFloat) or not symbols(node):
        return False
    env = {s: torch.ones((), dtype=torch.float64) for s in free_symbols(number)}
    try:
        sympy_interp(TensorReferenceAnalysis, env, number.node.expr)
    except (NotImplementedError, AttributeError, KeyError):
        return False  # round(s, 1), s % 2: torch would make a constant of it, or fail
    return True


def uses(graph: Graph) -> list[Node]:
    """The nodes that use a variable float for anything but the computation of another number."""
    return [n for n in graph.nodes if not _is_computation(n) and used(n)]


def used(node: Node) -> Symbols:
    """The variable floats among the inputs of ``node``, and those that these are computed from."""
    return frozenset[Any]().union(*map(symbols, node.all_input_nodes))


def is_kept(node: Node) -> bool:
    """Whether torch computes in tensors all that ``node`` does with variable floats."""
    if node.target not in _KEPT or len(node.all_input_nodes) != 2 or len(node.args) > 2:
        return False
    if len(node.args) + len(node.kwargs) != 2 or not set(node.kwargs) <= {"input", "other"}:
        return False  # an alpha, a rounding mode
    tensors = [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
    return len(tensors) == 1 and sum(map(is_variable, node.all_input_nodes)) == 1


def mixed(kept: Sequence[Node], stuck: Sequence[Node]) -> Symbols:
    """The floats with uses of both kinds, those that torch would bake a value in for.

    Torch may take apart into products what is counted as stuck here, so stuck uses are taken to be
    of one kind only if they are calls of the same operator.
    """
    kinds: dict[Any, set[Any]] = {}
    for nodes, is_stuck in ((kept, False), (stuck, True)):
        for node in nodes:
            for symbol in used(node):
                kinds.setdefault(symbol, set()).add(node.target if is_stuck else None)
    return frozenset(s for s, k in kinds.items() if len(k) > 1 and symbol_is_type(s, SymT.FLOAT))


def make_constant(graph: Graph, chosen: Symbols) -> int:
    """Put its value in place of each float in ``chosen``, and guard that value.

    Floats that are guarded to have one value already are taken as well: AOTAutograd's cache, again,
    knows their graph by the input alone. What is computed of them is left to Python's arithmetic.

    Returns:
        How many nodes were replaced.
    """
    numbers = [n for n in graph.nodes if isinstance(value(n), torch.SymFloat)]
    inputs = [n for n in numbers if not _is_computation(n)]
    constants = [n for n in inputs if symbols(n) <= chosen and (symbols(n) or _is_constant(n))]
    for node in constants:
        guarded = float(value(node))
        # fx takes constants here, as torch's own pass has it.
        node.replace_all_uses_with(cast(Any, guarded))
        graph.erase_node(node)
    return len(constants)


def _is_constant(node: Node) -> bool:
    return not free_symbols(value(node))


def _is_computation(node: Node) -> bool:
    inputs = (value(n) for n in node.all_input_nodes)
    return isinstance(value(node), _SCALAR) and all(isinstance(v, _SCALAR) for v in inputs)
