"""Insert the norm and the scale into a step graph, right before the update.

Contract: in a graph that holds one ``compileclip.step_norm`` node and reads the gradients from
given nodes, that node becomes the total norm of all the gradients, and every other reader of a
gradient reads ``gradient * clip_coef`` instead.

Why it is legal: the gradients are inputs, written by nothing before the update, so the norm may be
taken ahead of everything else; and an update that reads ``g * coef`` from a register is the same
function as one that reads it from memory after ``g.mul_(coef)``. With ``write_grads`` the product
is stored as well, in place, because a caller reads it. A ``grad_scale`` that the gradients still
have, as a ``GradScaler`` gives it, is taken out by the same product.

Before::

    norm = step_norm(max_norm, None)        # stands for the norm
    exp_avg.lerp_(grad, 1 - beta1)

After::

    norm = total_norm([grad, ...], p)
    coef = clamp(max_norm / (norm + 1e-6), max=1.0)
    clipped = grad * coef                   # grad.mul_(coef) with write_grads
    exp_avg.lerp_(clipped, 1 - beta1)

It works on the graph that Dynamo captures (calls of torch's Python functions, in place), before
AOTAutograd: there a gradient can be told from other inputs, and the optimizer is not yet taken
apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import fx
from torch.fx import Graph, Node

from compileclip.eager import reference

ATEN = torch.ops.aten
# Looked up once: two threads that look an overload up for the first time get one each.
STEP_NORM = torch.ops.compileclip.step_norm.default
TOTAL_NORM = torch.ops.compileclip.total_norm.default


@dataclass(frozen=True)
class InsertNormAndScale:
    """The pass, with what it must know of the settings.

    Attributes:
        norm_type: the order p of the norm.
        clip: whether to scale; otherwise the norm is only measured.
        write_grads: whether to store the scaled gradients.
        skip: whether a norm that is not finite leaves the gradients as they are.
    """

    name: ClassVar[str] = "insert_norm_and_scale_pass"
    runs_on: ClassVar[str] = "step"

    norm_type: float
    clip: bool = True
    write_grads: bool = False
    skip: bool = False

    def __call__(self, graph: Graph, gradients: Sequence[Node]) -> int:
        """Rewrite ``graph`` in place.

        Args:
            graph: a step graph with one ``compileclip.step_norm`` node.
            gradients: the node of each gradient, in the order of the norm, with the tensor that
                it stands for in ``meta["example_value"]``; a gradient that two parameters share
                stands there twice.

        Returns:
            The number of gradients scaled.

        Raises:
            ValueError: the graph has not exactly one ``compileclip.step_norm`` node.
        """
        marker = _marker(graph)
        args = cast(tuple[Node | None, ...], (*marker.args, None))
        max_norm, given, grad_scale = args[:3]
        readers = {g: list(g.users) for g in gradients}
        with graph.inserting_before(marker):
            norm = given or _call(graph, TOTAL_NORM, list(gradients), self.norm_type)
            factor = self._factor(graph, cast(Node, max_norm), norm, grad_scale)
            if factor is not None:
                for gradient, nodes in readers.items():
                    clipped = _scale(graph, gradient, factor, stored=self.write_grads)
                    for reader in nodes:
                        reader.replace_input_with(gradient, clipped)
        marker.replace_all_uses_with(norm)
        graph.erase_node(marker)
        graph.lint()
        return 0 if factor is None else len(readers)

    def _factor(
        self, graph: Graph, max_norm: Node, norm: Node, grad_scale: Node | None
    ) -> Node | None:
        """What the gradients are multiplied by, if they are."""
        if not self.clip:
            return None if grad_scale is None else _call(graph, ATEN.reciprocal.default, grad_scale)
        coef = _clip_coef(graph, max_norm, norm)
        if self.skip:
            finite = _call(graph, torch.isfinite, norm)
            one = _call(graph, ATEN.full_like.default, coef, 1.0)
            coef = _call(graph, ATEN.where.self, finite, coef, one)
        return coef if grad_scale is None else _call(graph, ATEN.div.Tensor, coef, grad_scale)


def _clip_coef(graph: Graph, max_norm: Node, norm: Node) -> Node:
    """``min(1, max_norm / (total_norm + 1e-6))``, by a reciprocal and a product as in torch."""
    dtype = norm.meta["example_value"].dtype
    bound = _call(graph, ATEN._to_copy.default, max_norm, dtype=dtype)
    reciprocal = _call(graph, ATEN.reciprocal.default, _call(graph, ATEN.add.Scalar, norm, 1e-6))
    product = _call(graph, ATEN.mul.Tensor, reciprocal, bound)
    return _call(graph, ATEN.clamp.default, product, None, 1.0)


def _scale(graph: Graph, gradient: Node, coef: Node, stored: bool) -> Node:
    """``gradient * coef``, a half precision gradient in float32 and rounded once.

    Of 0 dimensions, it and a float64 coefficient make a float64 product.
    """
    dtype = gradient.meta["example_value"].dtype
    wide = gradient
    if dtype in reference.HALF:
        wide = _call(graph, ATEN._to_copy.default, gradient, dtype=torch.float32)
    product = _call(graph, ATEN.mul.Tensor, wide, coef)
    if product.meta["example_value"].dtype != dtype:
        product = _call(graph, ATEN._to_copy.default, product, dtype=dtype)
    return _call(graph, ATEN.copy_.default, gradient, product) if stored else product


def _call(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A call of ``target`` with the metadata that Dynamo's own nodes have."""
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
    node.meta["example_value"] = target(*values[0], **values[1])
    return node


def _marker(graph: Graph) -> Node:
    # Dynamo captures the overload packet, a traced function its default overload.
    targets = (torch.ops.compileclip.step_norm, STEP_NORM)
    found: list[Node] = [node for node in graph.nodes if node.target in targets]
    if len(found) != 1:
        raise ValueError(
            f"a step graph has one compileclip.step_norm node, this one has {len(found)}; "
            "capture the step behind one call of that operator"
        )
    return found[0]
