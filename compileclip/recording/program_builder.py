"""From a recorded step to the program that a lowering compiles.

Private parts of torch, read in 2.13: ``torch._C._should_allow_numbers_as_tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Graph, Node

from compileclip.lowering.program import Program
from compileclip.passes.insert_norm_and_scale import STEP_NORM, InsertNormAndScale
from compileclip.recording.pointwise_ops import functional
from compileclip.recording.recorder import SCALAR, Call, Recording
from compileclip.recording.shadow import NotPointwiseError

ATEN = torch.ops.aten
SAME = {ATEN.detach.default, ATEN.alias.default, ATEN.lift_fresh.default, ATEN.clone.default}
GRAD_SCALE, FOUND_INF = "grad_scale", "found_inf"  # of a GradScaler
COUNT = "count_"  # before the names of a recording's 0-dim tensors, where they are values
FILLED = {"zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "ones_like": 1.0, "empty_like": 0.0}


@dataclass(frozen=True)
class Kind:
    """What a program is made for, besides what a step does.

    Attributes:
        insert: the pass that inserts norm and scale; where it clips, the program reads the values
            "max_norm" (float64) and "norm".
        norm: the dtype of the total norm.
        grad_scale: whether gradients are to be divided by the value "grad_scale", float32.
        found_inf: whether nothing is stored where the value "found_inf", float32, is not 0.
        finite: whether nothing is stored where the norm is not finite.
    """

    insert: InsertNormAndScale
    norm: torch.dtype
    grad_scale: bool = False
    found_inf: bool = False
    finite: bool = False


def assemble(recording: Recording, dtypes: Mapping[str, torch.dtype], kind: Kind) -> Program:
    """Make the program of ``recording``, with the norm and the scale inserted.

    Args:
        recording: what the step did.
        dtypes: of the operands, "param", "grad" and state, new state included.
        kind: what else it is to do.

    Returns:
        The program. Its scalars are those of the recording, in their order; its operands, those of
        ``dtypes``; its values, those of ``kind`` and the recording's 0-dim tensors.

    Raises:
        NotPointwiseError: an operation has no functional form.
    """
    build = _Build(recording, dtypes, kind)
    for call in recording.calls:
        build.add(call)
    condition = build.condition(kind)
    after = {name: build.env[number] for name, number in recording.after.items()}
    counted = [name for name, node in build.counts.items() if after[name] is not node]
    results = [after[name] for name in (*dtypes, *counted)]
    build.graph.output((*results, *condition))
    kind.insert(build.graph, [build.operands["grad"]])
    return _stored(build, dtypes, kind.insert.write_grads, counted, bool(condition))


class _Build:
    def __init__(self, recording: Recording, dtypes: Mapping[str, torch.dtype], kind: Kind) -> None:
        self.graph = Graph()
        self.operands = {name: self._operand(name, dtype) for name, dtype in dtypes.items()}
        norm = [self._value("max_norm", torch.float64), self._value("norm", kind.norm)]
        self._norm = norm[1]
        if kind.grad_scale:
            norm.append(self._value(GRAD_SCALE, torch.float32))
        self.counts = {
            name: self._value(COUNT + name, dtype) for name, dtype in recording.counts.items()
        }
        self._scalars = iter([self._scalar(i) for i in range(len(recording.scalars))])
        given = {**self.operands, **self.counts}
        self.env = {number: given[name] for name, number in recording.before.items()}
        self.call(STEP_NORM, *norm)

    def condition(self, kind: Kind) -> list[Node]:
        """The node that tells whether the step counts, if ``kind`` asks for one."""
        found = []
        if kind.finite:
            found.append(self.call(ATEN.isfinite.default, self._norm))
        if kind.found_inf:
            found.append(self.call(ATEN.eq.Scalar, self._value(FOUND_INF, torch.float32), 0))
        if len(found) == 2:
            found = [self.call(ATEN.logical_and.default, *found)]
        return found

    def add(self, call: Call) -> None:
        """Add the functional form of ``call``."""
        leaves = [self._leaf(leaf) for leaf in call.leaves]
        count = len(leaves) - len(call.names)
        keywords = dict(zip(call.names, leaves[count:], strict=True))
        name = call.func._schema.name.removeprefix("aten::")
        if name in FILLED or name in ("full", "full_like"):
            fill = FILLED.get(name)
            floats = [n for n in leaves if isinstance(n, Node) and _is_float(n)]
            number = floats[0] if fill is None else fill
            result = self._filled(number, keywords.get("dtype"), self._like(leaves))
        elif name in ("copy_", "fill_", "zero_"):
            source: Any = leaves[1] if len(leaves) > 1 else 0.0
            written = self.env[call.out]
            is_number = not isinstance(source, Node) or _is_float(source)
            dtype = written.meta["val"].dtype
            result = self._filled(source, dtype, written) if is_number else source
        elif call.func in SAME:
            result = leaves[0]
        elif call.func == ATEN.index_put_.default:
            result = self.where(leaves[1], leaves[2], leaves[0])
        elif call.func == ATEN.where.self:
            result = self.where(*leaves)
        else:
            kept = {k: v for k, v in keywords.items() if k not in ("out", "memory_format")}
            result = self.call(functional(call.func), *leaves[:count], **kept)
        if call.func._schema.is_mutable and "out" not in call.names:
            result = self.cast(result, self.env[call.out].meta["val"].dtype)
        self.env[call.out] = result

    def call(self, target: OpOverload, *args: Any, **kwargs: Any) -> Node:
        if not torch._C._should_allow_numbers_as_tensors(target._schema.name.split("::")[1]):
            args = tuple(self._tensors(target, args))
        node = self.graph.call_function(target, args, kwargs)
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        return _valued(node, target(*given[0], **given[1]))

    def _tensors(self, target: OpOverload, args: Sequence[Any]) -> Iterator[Any]:
        """Arguments, with tensors of one value where ``target`` takes no number.

        A 0-dim tensor of the host is a number here. ATen reads it in the dtype that those with
        elements are promoted to.
        """
        values = [arg.meta["val"] for arg in args if isinstance(arg, Node)]
        dtypes = [v.dtype for v in values if isinstance(v, Tensor) and v.dim() > 0]
        for argument, given in zip(target._schema.arguments, args, strict=False):
            if not _is_float(given) or "Tensor" not in str(argument.type):
                yield given
                continue
            dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.bool
            if not dtype.is_floating_point:
                raise NotPointwiseError(f"{target} takes a tensor that is no state")
            yield self._filled(given, dtype, self.operands["param"])

    def where(self, condition: Node, one: Node, other: Node) -> Node:
        """A choice, of which either may be a float."""
        kinds = (_is_float(one), _is_float(other))
        names = {(True, True): "Scalar", (True, False): "ScalarSelf", (False, True): "ScalarOther"}
        return self.call(getattr(ATEN.where, names.get(kinds, "self")), condition, one, other)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(ATEN._to_copy.default, node, dtype=dtype)

    def _filled(self, fill: Any, dtype: torch.dtype | None, like: Node) -> Node:
        kwargs = {} if dtype is None else {"dtype": dtype}
        return self.call(ATEN.full_like.default, like, fill, **kwargs)

    def _like(self, leaves: list[Any]) -> Node:
        """What has the shape of a new tensor: a 0-dim one that it is made like, or a parameter."""
        first = leaves[0] if leaves and isinstance(leaves[0], Node) else None
        is_count = first is not None and not _is_float(first) and first.meta["val"].dim() == 0
        return first if is_count and first is not None else self.operands["param"]

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
    build: _Build,
    dtypes: Mapping[str, torch.dtype],
    grads: bool,
    counted: Sequence[str],
    conditional: bool,
) -> Program:
    """Keep of the outputs what differs from the operand, and drop what nothing reads."""
    graph, operands = build.graph, build.operands
    for node in graph.find_nodes(op="call_function", target=ATEN.copy_.default):
        node.replace_all_uses_with(node.args[1])  # the gradient's write-back is an output
        graph.erase_node(node)
    output = graph.output_node()
    (results,) = output.args
    assert isinstance(results, tuple)
    stored = {
        name: node
        for name, node in zip(operands, results, strict=False)
        if node is not operands[name] and (grads or name != "grad")
    }
    for name, node in stored.items():
        assert isinstance(node, Node)
        if _value_of(node).dtype != dtypes[name]:
            raise NotPointwiseError(f"{name!r} changes its dtype")
    output.args = ((*stored.values(), *results[len(operands) :]),)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dim() == 0 and not node.users:
            graph.erase_node(node)  # such as the norm where nothing is clipped
    for node in graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    graph.lint()
    for name, node in zip(counted, results[len(operands) :], strict=False):
        if _value_of(node).dtype != build.counts[name].meta["val"].dtype:
            raise NotPointwiseError(f"{name!r} changes its dtype")
    names = tuple(operands[name].name for name in stored)
    return Program(graph, names, tuple(counted), conditional)


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
