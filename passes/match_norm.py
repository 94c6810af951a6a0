"""Recognise the p-norm of one tensor in an ATen graph, whole or as decompositions leave it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from compileclip.eager import reference

ATEN = torch.ops.aten
PRIMS = torch.ops.prims
CASTS = (PRIMS.convert_element_type.default, ATEN._to_copy.default, PRIMS.device_put.default)
_RESHAPES = (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default)


@dataclass(frozen=True)
class Norm:
    """A p-norm in a graph: of ``source``, computed by ``nodes``, of any order if that is None."""

    source: Node
    order: float | None
    nodes: tuple[Node, ...]


def norm_of_one(node: Node) -> Norm | None:
    """Match the p-norm of one tensor ``x``, whole or taken apart.

    linalg_vector_norm(x, p)        getitem(_foreach_norm([.., x, ..], p), i)
    pow(sum(pow([abs(x)], p)), 1/p)      without abs where p is even and x real
    amax(abs(x)) for inf, amin(abs(x)) for -inf, sum(ne(x, 0)) for 0
    select(view(abs(x)), 0, 0), of one element, or abs(x), 0-dim: the norm for every p > 0
    """
    for match in (_whole, _power_sum, _extreme, _count, _one_element):
        norm = match(node)
        if norm is not None:
            return norm
    return None


def _whole(node: Node) -> Norm | None:
    if node.target == ATEN.linalg_vector_norm.default:
        source = node.args[0]
        order = node.args[1] if len(node.args) > 1 else 2.0
        return _norm(source, order, node) if _reduces_all(node, 2) else None
    if node.target is not operator.getitem or not isinstance(node.args[0], Node):
        return None
    foreach, index = node.args[0], node.args[1]
    if foreach.target != ATEN._foreach_norm.Scalar or not isinstance(index, int):
        return None
    order = foreach.args[1] if len(foreach.args) > 1 else 2.0
    return _norm(nodes_in(foreach.args[0])[index], order, node, foreach)


def _power_sum(node: Node) -> Norm | None:
    total = _input(node, ATEN.pow.Tensor_Scalar)
    powers = _input(total, ATEN.sum.dim_IntList) or _input(total, ATEN.sum.default)
    base = _input(powers, ATEN.pow.Tensor_Scalar)
    if total is None or powers is None or base is None or not _reduces_all(total, 1):
        return None
    order, root = powers.args[1], node.args[1]
    if not isinstance(order, float | int) or order == 0 or root != 1.0 / order:
        return None
    source = _input(base, ATEN.abs.default)
    if source is not None:
        return _norm(source, order, node, total, powers, base)
    if order % 2 != 0 or _is_complex(base):
        return None  # without abs, no norm
    return _norm(base, order, node, total, powers)


def _extreme(node: Node) -> Norm | None:
    for target, order in ((ATEN.amax.default, math.inf), (ATEN.amin.default, -math.inf)):
        absolute = _input(node, target)
        source = _input(absolute, ATEN.abs.default)
        if absolute is not None and source is not None and _reduces_all(node, 1):
            return _norm(source, order, node, absolute)
    return None


def _count(node: Node) -> Norm | None:
    nonzero = _input(node, ATEN.sum.dim_IntList) or _input(node, ATEN.sum.default)
    source = _input(nonzero, ATEN.ne.Scalar)
    if nonzero is None or source is None or nonzero.args[1] != 0 or not _reduces_all(node, 1):
        return None
    return _norm(source, 0.0, node, nonzero)


def _one_element(node: Node) -> Norm | None:
    inner, chain = node, [node]
    if node.target == ATEN.select.int and node.args[1:] == (0, 0):
        inner, reshapes = strip(node.all_input_nodes[0], (*CASTS, *_RESHAPES))
        chain += [*reshapes, inner]
    source = _input(inner, ATEN.abs.default)
    value = None if source is None else source.meta.get("val")
    # A symbolic size is none that torch took this road for.
    if source is None or not isinstance(value, Tensor) or [s for s in value.shape if s != 1]:
        return None
    return _norm(source, None, *chain)


def _norm(source: object, order: object, *nodes: Node) -> Norm | None:
    if not isinstance(source, Node) or not isinstance(order, float | int | None):
        return None
    return Norm(source, None if order is None else float(order), nodes)


def _input(node: Node | None, target: object) -> Node | None:
    """The first argument of ``node`` if it is a call of ``target``."""
    if node is None or node.target != target or not isinstance(node.args[0], Node):
        return None
    return node.args[0]


def _reduces_all(node: Node, dim: int) -> bool:
    """Whether the reduction's argument number ``dim`` names no dimension; keepdim follows it."""
    return all(not argument for argument in node.args[dim:]) and not node.kwargs.get("keepdim")


def strip(node: Node, targets: Sequence[object]) -> tuple[Node, list[Node]]:
    """Go up while ``node`` is a call of one of ``targets`` between floating point tensors."""
    passed: list[Node] = []
    while node.target in targets and isinstance(node.args[0], Node) and _is_float(node):
        passed.append(node)
        node = node.args[0]
    return node, passed


def strip_widening(node: Node) -> tuple[Node, list[Node]]:
    """Leave out a cast of float16 or bfloat16 to float32, which changes no value."""
    above = _input(node, PRIMS.convert_element_type.default)
    if above is None or not _is_float(node) or not isinstance(above.meta.get("val"), Tensor):
        return node, []
    widens = above.meta["val"].dtype in reference.HALF and node.args[1] == torch.float32
    return (above, [node]) if widens and len(node.users) == 1 else (node, [])


def nodes_in(argument: object) -> list[Node]:
    """The nodes in a list argument."""
    if not isinstance(argument, list | tuple):
        return []
    return [n for n in argument if isinstance(n, Node)]


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()
