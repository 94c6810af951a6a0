"""Take the total norm of ``torch.nn.utils.clip_grad_norm_`` with one operator.

Contract: in a functional ATen graph, a p-norm of a stack of p-norms of single tensors, none of them
read by anything else, becomes one ``compileclip.total_norm`` of these tensors, in the dtype that
the graph had; every other graph stays as it is.

Why it is legal: the p-norm of the p-norms of parts is the p-norm of the whole, for every p (for
p = 0 the operator counts as torch does); the tensors are values that nothing writes between the
first of the norms and the last; and a norm of one tensor that somebody else reads stays where it
is, together with its total. The operator sums in float64, where torch sums in float32, so the last
bits may differ, towards the true norm. The rest of the clip is left alone: Inductor fuses the
coefficient and the products into the update by itself, and the clamps of ``clip_grad_value_`` too.

Before (foreach; N gradients of any number of dtypes and devices)::

    norms = _foreach_norm([g0, g1], 2.0)
    cat = cat([unsqueeze(norms[0], 0), unsqueeze(norms[1], 0)])
    total = pow(sum(pow(cat, 2.0)), 0.5)

After::

    total = total_norm([g0, g1], 2.0)

It runs in ``post_grad_custom_pre_pass``. AOTAutograd takes ``linalg_vector_norm`` and ``stack``
apart while it traces, so a slot that still has them must come before AOTAutograd
(``pre_grad_custom_pass``), where gradients are written in place and those that a traced backward
computes do not exist yet. After it, a norm is a chain of a few shapes (``norm_of_one`` draws
them), nothing is written in place, and other passes have cleaned up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node

from compileclip.eager import reference
from compileclip.passes.match_norm import CASTS, Norm, nodes_in, norm_of_one, strip, strip_widening

ATEN = torch.ops.aten
PRIMS = torch.ops.prims
TOTAL_NORM = torch.ops.compileclip.total_norm.default


@dataclass(frozen=True)
class _TotalNorm:
    """A p-norm of p-norms: ``root`` is its result and the last of ``nodes``."""

    root: Node
    order: float
    tensors: tuple[Node, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class FuseStockClip:
    """The pass; it has no settings."""

    name: ClassVar[str] = "fuse_stock_clip_pass"
    runs_on: ClassVar[str] = "aten"

    def __call__(self, graph: Graph) -> int:
        """Rewrite ``graph`` and return the number of total norms replaced."""
        position = {node: i for i, node in enumerate(graph.nodes)}
        writes = [i for node, i in position.items() if _writes(node)]
        matches = []
        for node in graph.nodes:
            match = _match_total_norm(node)
            if match is None:
                continue
            first = min(position[n] for n in match.nodes)
            if any(first < i < position[match.root] for i in writes):
                continue
            if not _fits(match):
                continue
            matches.append(match)
        matches = _without_other_readers(matches)
        for match in matches:
            _rewrite(graph, match)
        if matches:
            graph.lint()
        return len(matches)


def _rewrite(graph: Graph, match: _TotalNorm) -> None:
    dtype = match.root.meta["val"].dtype
    with graph.inserting_before(match.root):
        total = graph.call_function(TOTAL_NORM, (list(match.tensors), match.order))
        total.meta["val"] = TOTAL_NORM([t.meta["val"] for t in match.tensors], match.order)
        if total.meta["val"].dtype != dtype:
            wide = total
            total = graph.call_function(PRIMS.convert_element_type.default, (wide, dtype))
            total.meta["val"] = wide.meta["val"].to(dtype)
    if "stack_trace" in match.root.meta:
        total.meta["stack_trace"] = match.root.meta["stack_trace"]
    match.root.replace_all_uses_with(total)
    # Two matches may share norms of single tensors; the last one to go takes them along.
    for node in sorted(match.nodes, reverse=True):
        if not node.users:
            graph.erase_node(node)


def _fits(match: _TotalNorm) -> bool:
    """Whether the operator gives a norm on the same device, and no narrower than the graph's."""
    result = match.root.meta.get("val")
    values = [t.meta.get("val") for t in match.tensors]
    tensors = [t for t in values if isinstance(t, Tensor) and t.layout == torch.strided]
    if len(tensors) < len(values) or not isinstance(result, Tensor) or result.dim() != 0:
        return False
    dtype = reference.norm_dtype(tensors)
    return result.device == tensors[0].device and torch.promote_types(dtype, result.dtype) == dtype


def _without_other_readers(matches: list[_TotalNorm]) -> list[_TotalNorm]:
    """Those whose inner nodes are read by these matches alone (two may share a tensor's norm)."""
    roots = {match.root for match in matches}
    matches = [m for m in matches if not roots.intersection(set(m.nodes) - {m.root})]
    while True:
        owned = {node for match in matches for node in match.nodes}
        kept = [
            m for m in matches if all(owned.issuperset(n.users) for n in m.nodes if n is not m.root)
        ]
        if len(kept) == len(matches):
            return kept
        matches = kept


def _match_total_norm(root: Node) -> _TotalNorm | None:
    """Match the whole.

    root <- norm of one <- [cast] <- cat <- N x (unsqueeze <- [casts] <- norm of one <- [cast] <- x)
    """
    outer = norm_of_one(root)
    if outer is None:
        return None
    stack, between = strip_widening(outer.source)
    stack, clones = strip(stack, (ATEN.clone.default,))  # what is left of a cat of one
    parts = _stacked(stack)
    if not parts:
        return None
    nodes = [*outer.nodes, *between, *clones, stack]
    norms: list[Norm] = []
    for part, rows in parts:
        part, casts = strip(part, CASTS)
        norm = norm_of_one(part)
        if norm is None:
            return None
        norms.append(norm)
        nodes += [*rows, *casts, *norm.nodes]
    orders = {n.order for n in (outer, *norms) if n.order is not None}
    if len(orders) != 1:
        return None
    tensors = tuple(strip_widening(n.source)[0] for n in norms)
    for norm in norms:
        nodes += strip_widening(norm.source)[1]
    return _TotalNorm(root, orders.pop(), tensors, tuple(dict.fromkeys(nodes)))


def _stacked(node: Node) -> list[tuple[Node, list[Node]]]:
    """The 0-dim tensors that ``node`` stacks, each with the node in between; none if it does not.

    stack([a, b]), or cat([unsqueeze(a, 0), unsqueeze(b, 0)]), or unsqueeze(a, 0) of one alone.
    """
    if node.target == ATEN.stack.default and node.args[1:] in ((), (0,), (-1,)):
        return [(n, []) for n in nodes_in(node.args[0])]
    if node.target == ATEN.cat.default and node.args[1:] in ((), (0,), (-1,)):
        rows = nodes_in(node.args[0])
    else:
        rows = [node]
    if not all(row.target == ATEN.unsqueeze.default and _ndim(row) == 1 for row in rows):
        return []
    return [(n, [row]) for row in rows for n in row.all_input_nodes]


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _ndim(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1
