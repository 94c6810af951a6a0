"""From a recorded step to the program that a lowering compiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Graph, Node

from compileclip.capture import SCALAR, Call, Recording, functional
from compileclip.passes.insert_norm_and_scale import STEP_NORM, InsertNormAndScale
from compileclip.program import Program
from compileclip.shadow import NotPointwiseError

ATEN = torch.ops.aten
SAME = {ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh.default, ATEN.clone.default}
VALUES = ("max_norm", "norm")
FILLED = {"zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "ones_like": 1.0, "empty_like": 0.0}


def assemble(
    recording: Recording,
    dtypes: Mapping[str, torch.dtype],
    norm_dtype: torch.dtype,
    insert: InsertNormAndScale,
) -> Program:
    """Make the program of ``recording``, with the norm and the scale inserted.

    Args:
        recording: what the step did.
        dtypes: of the operands, "param", "grad" and state, new state included.
        norm_dtype: of the total norm.
        insert: the pass; where it clips, the program reads the values of ``VALUES``.

    Returns:
        The program. Its scalars are those of the recording, in their order; its operands, those of
        ``dtypes``.

    Raises:
        NotPointwiseError: an operation has no functional form.
    """
    build = _Build(recording, dtypes, norm_dtype)
    for call in recording.calls:
        build.add(call)
    graph = build.graph
    graph.output(tuple(build.env[recording.after[name]] for name in dtypes))
    insert(graph, [build.operands["grad"]])
    return _stored(graph, build.operands, dtypes, insert.write_grads)


class _Build:
    def __init__(
        self, recording: Recording, dtypes: Mapping[str, torch.dtype], norm_dtype: torch.dtype
    ) -> None:
        self.graph = Graph()
        self.operands = {name: self._operand(name, dtype) for name, dtype in dtypes.items()}
        dtypes_of_values = (torch.float64, norm_dtype)
        values = [self._value(*pair) for pair in zip(VALUES, dtypes_of_values, strict=True)]
        self._scalars = iter([self._scalar(i) for i in range(len(recording.scalars))])
        self.env = {number: self.operands[name] for name, number in recording.before.items()}
        self.call(STEP_NORM, *values)

    def add(self, call: Call) -> None:
        """Add the functional form of ``call``."""
        leaves = [self._leaf(leaf) for leaf in call.leaves]
        count = len(leaves) - len(call.names)
        keywords = dict(zip(call.names, leaves[count:], strict=True))
        name = call.func._schema.name.removeprefix("aten::")
        if name in FILLED or name in ("full", "full_like"):
            fill = FILLED.get(name)
            floats = [n for n in leaves if isinstance(n, Node) and _is_float(n)]
            result = self._filled(floats[0] if fill is None else fill, keywords.get("dtype"))
        elif name == "copy_":
            result = leaves[1] if isinstance(leaves[1], Node) else leaves[0]
            if _is_float(result):
                result = self._filled(result, self.env[call.out].meta["val"].dtype)
        elif call.func in SAME:
            result = leaves[0]
        elif call.func == ATEN.index_put_.default:
            target = ATEN.where.ScalarSelf if _is_float(leaves[2]) else ATEN.where.self
            result = self.call(target, leaves[1], leaves[2], leaves[0])
        else:
            kept = {k: v for k, v in keywords.items() if k not in ("out", "memory_format")}
            result = self.call(functional(call.func), *leaves[:count], **kept)
        if call.func._schema.is_mutable and "out" not in call.names:
            result = self.cast(result, self.env[call.out].meta["val"].dtype)
        self.env[call.out] = result

    def call(self, target: OpOverload, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        return _valued(node, target(*given[0], **given[1]))

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(ATEN._to_copy.default, node, dtype=dtype)

    def _filled(self, fill: Any, dtype: torch.dtype | None) -> Node:
        kwargs = {} if dtype is None else {"dtype": dtype}
        return self.call(ATEN.full_like.default, self.operands["param"], fill, **kwargs)

    def _leaf(self, leaf: Any) -> Any:
        if leaf is SCALAR:
            return next(self._scalars)
        return leaf[0] if isinstance(leaf, tuple) else self.env[leaf]

    def _operand(self, name: str, dtype: torch.dtype) -> Node:
        return _valued(self.graph.placeholder(name), torch.empty(4, dtype=dtype, device="meta"))

    def _value(self, name: str, dtype: torch.dtype) -> Node:
        return _valued(self.graph.placeholder(name), torch.empty((), dtype=dtype, device="meta"))

    def _scalar(self, index: int) -> Node:
        return _valued(self.graph.placeholder(f"scalar_{index}"), 1.0)


def _stored(
    graph: Graph, operands: Mapping[str, Node], dtypes: Mapping[str, torch.dtype], grads: bool
) -> Program:
    """Keep of the outputs what differs from the operand, and drop what nothing reads."""
    for node in graph.find_nodes(op="call_function", target=ATEN.copy_.default):
        node.replace_all_uses_with(node.args[1])  # the gradient's write-back is an output
        graph.erase_node(node)
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple)
    stored = {
        name: node
        for name, node in zip(operands, results, strict=True)
        if node is not operands[name] and (grads or name != "grad")
    }
    for name, node in stored.items():
        assert isinstance(node, Node)
        if _value_of(node).dtype != dtypes[name]:
            raise NotPointwiseError(f"{name!r} changes its dtype")
    output.args = (tuple(stored.values()),)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        if node.name in VALUES and not node.users:
            graph.erase_node(node)  # nothing is clipped
    for node in graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    graph.lint()
    return Program(graph, tuple(operands[name].name for name in stored))


def _valued(node: Node, value: Any) -> Node:
    # Passes that run on Dynamo's graphs know values as example_value, the others as val.
    node.meta["val"] = node.meta["example_value"] = value
    return node


def _value_of(node: Node) -> Tensor:
    value = node.meta.get("val", node.meta.get("example_value"))
    assert isinstance(value, Tensor)
    return value


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta["val"], float)
