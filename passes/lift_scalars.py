"""Let hyperparameters be inputs of the compiled graph wherever the optimizer uses them.

Contract: in a graph that Dynamo captured, a call that takes a float computed from the graph's
inputs as ``alpha``, ``value``, weight or base becomes products of tensors with that float. A call
whose result would have another dtype is left alone. A float that is also used where it cannot stay
variable becomes a constant of the graph, guarded, as torch has it without this pass.

Why it is legal: ``add(x, y, alpha=s)`` is ``x + s * y``, ``addcdiv(x, y, z, value=s)`` is
``x + s * (y / z)``, ``lerp(x, y, s)`` is ``x + (y - x) * s`` by their definitions; a product may be
rounded once more than in a fused multiply-add, as wherever Inductor does not contract it. Why some
floats must be constants, ``variable_floats`` says.

Why it is worth it: AOTAutograd keeps a float input variable only where it multiplies or adds to one
tensor. Anywhere else it becomes a constant, and each new learning rate or beta another compilation.

Before::                                    After::

    param.add_(grad, alpha=neg)                 scaled = torch.mul(grad, neg)
                                                param.add_(scaled)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from compileclip.passes import variable_floats as floats
from compileclip.passes.scalar_rules import RULES, Nodes


@dataclass(frozen=True)
class LiftScalars:
    """The pass; it has no fields."""

    name: ClassVar[str] = "lift_scalars_pass"
    runs_on: ClassVar[str] = "captured"

    def __call__(self, graph: Graph) -> int:
        """Rewrite ``graph`` in place and return the number of calls and floats replaced."""
        stuck: list[Node] = []
        kept: list[Node] = []
        plans: list[tuple[Node, Node, Nodes]] = []
        for node in floats.uses(graph):
            nodes = Nodes(graph, node)
            replacement = _replacement(nodes, node)
            if replacement is not None:
                plans.append((node, replacement, nodes))
            stays = replacement is not None or floats.is_kept(node)
            (kept if stays else stuck).append(node)
        constant = floats.mixed(kept, stuck)
        rewritten: int = 0
        for node, replacement, nodes in plans:
            if floats.used(node) <= constant:
                nodes.erase()
                continue
            replacement.meta = dict(node.meta)  # shapes and dtypes are the same
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
            rewritten += 1
        rewritten += floats.make_constant(graph, constant)
        if rewritten:
            graph.lint()
        return rewritten


def _replacement(nodes: Nodes, node: Node) -> Node | None:
    """What a rule makes of ``node``, if that has the same shapes, dtypes and devices."""
    key = str(node.target) if isinstance(node.target, OpOverload) else node.target
    overload, rule = RULES.get(key, (None, None))
    arguments = None if rule is None else _bind(node, overload)
    if rule is None or arguments is None:
        return None
    replacement: Node | None = rule(nodes, node.target, arguments)
    if replacement is not None and not _same(floats.value(replacement), floats.value(node)):
        nodes.erase()
        return None
    return replacement


def _bind(node: Node, overload: OpOverload | None) -> dict[str, Any] | None:
    """The arguments of ``node`` by the schema's names; None if they are those of another overload.

    Deprecated orders, as ``add_(x, alpha, y)``, have more positional arguments than the schema.
    """
    schema = (node.target if overload is None else overload)._schema  # type: ignore[union-attr]
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    given = {"self" if name == "input" else name: v for name, v in node.kwargs.items()}
    if len(node.args) > len(positional) or not given.keys() <= {a.name for a in schema.arguments}:
        return None
    given |= dict(zip(positional, node.args, strict=False))
    return {a.name: given[a.name] for a in schema.arguments if a.name in given}


def _same(new: Any, old: Any) -> bool:
    """Whether two values, of which lists are compared one by one, look alike to what reads them."""
    news, olds = pytree.tree_leaves(new), pytree.tree_leaves(old)
    return new is old or (len(news) == len(olds) and all(map(_look_alike, news, olds)))


def _look_alike(new: Any, old: Any) -> bool:
    return bool(
        isinstance(old, torch.Tensor)
        and (new.dtype, new.device) == (old.dtype, old.device)
        and new.shape == old.shape
    )
