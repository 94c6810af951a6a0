"""Take a gradient's share of the total norm in the kernel that makes the gradient.

Contract: in a functional ATen graph, a large gradient that a pointwise operation makes leaves the
list of ``compileclip.total_norm``, and its own norm takes its place there; every other graph stays
as it is.

Why it is legal: the p-norm of the p-norms of parts is the p-norm of the whole. Squares of float32
and of half precision neither overflow nor underflow in float64, in which the share is summed, as
the operator sums; its rounding to float32 adds at most 6e-8 of the total.

Why it pays: Inductor fuses the sum into the kernel of the pointwise operation, so the norm does
not read that gradient: 4 bytes per float32 element. A sum of many elements ends in a small kernel
of its own, though, so a gradient is to be large. One that comes out of a matrix product, which is
no kernel of Inductor's, stays in the list, and so does one that a reduction makes: a sum over its
result is not fused with it.

Before::

    grad = add(a, b)
    total = total_norm([grad, other], 2.0)

After::

    grad = add(a, b)
    wide = convert_element_type(grad, float64)
    share = sqrt(sum(mul(wide, wide)))                # for inf: amax(abs(grad))
    total = total_norm([convert_element_type(share, float32), other], 2.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from compileclip.eager import reference

ATEN = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
TOTAL_NORM = torch.ops.compileclip.total_norm.default
VIEWS = (ATEN.reshape.default, ATEN.view.default, ATEN.permute.default, ATEN.unsqueeze.default)
LARGE = 1 << 20  # elements: 4 MiB of float32, which a GPU reads in the time of a small kernel


@dataclass(frozen=True)
class ShareNorm:
    """The pass.

    Attributes:
        least: how many elements a gradient has at least.
    """

    name: ClassVar[str] = "share_norm_pass"
    runs_on: ClassVar[str] = "aten"

    least: int = LARGE

    def __call__(self, graph: Graph) -> int:
        """Rewrite ``graph`` and return the number of shares."""
        shares = 0
        for norm in graph.find_nodes(op="call_function", target=TOTAL_NORM):
            tensors, order = cast(tuple[list[Node], float], norm.args)
            chosen = {t for t in tensors if order in (2.0, math.inf) and self._gains(t)}
            if chosen:
                _rewrite(graph, norm, chosen)
                shares += len(chosen)
        if shares:
            graph.lint()
        return shares

    def _gains(self, gradient: Node) -> bool:
        value = gradient.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, *reference.HALF):
            return False
        numel = value.numel()
        if not isinstance(numel, int) or numel < self.least:  # symbolic, or small
            return False
        source = gradient
        while source.target in VIEWS:
            source = source.all_input_nodes[0]
        return isinstance(source.target, OpOverload) and torch.Tag.pointwise in source.target.tags


def _rewrite(graph: Graph, norm: Node, chosen: set[Node]) -> None:
    tensors, order = cast(tuple[list[Node], float], norm.args)
    with graph.inserting_before(norm):
        shares = {t: _share(graph, t, order) for t in tensors if t in chosen}
        # A new node: the strides that the old one asks of its arguments are of other tensors.
        total = _call(graph, TOTAL_NORM, [shares.get(t, t) for t in tensors], order)
    norm.replace_all_uses_with(total)
    graph.erase_node(norm)


def _share(graph: Graph, gradient: Node, order: float) -> Node:
    if order == math.inf:
        share = _call(graph, ATEN.amax.default, _call(graph, ATEN.abs.default, gradient))
    else:
        wide = _call(graph, CONVERT, gradient, torch.float64)
        squares = _call(graph, ATEN.mul.Tensor, wide, wide)
        share = _call(graph, ATEN.sqrt.default, _call(graph, ATEN.sum.default, squares))
    return _call(graph, CONVERT, share, torch.float32)


def _call(graph: Graph, target: OpOverload, *args: Any) -> Node:
    """A call of ``target`` with the metadata that Inductor asks for."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))
    return node
