"""A program as lines of Triton: what is computed of each element, and what once for all tensors.

A node is a variable of its own dtype. An operation reads its arguments in the dtype that ATen
promotes them to, computes in the dtype that ATen computes in (float32 for 16 bits), and rounds.

What an operation on elements reads that is one for all tensors (a scalar, the clip coefficient, a
bias correction) is a *slot*: computed once a step, in the dtype in which it is read, and loaded by
the kernel that updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from compileclip.fallback import UnsupportedError
from compileclip.lowering.program import dtype_of
from compileclip.lowering.triton.triton_ops import (
    ATEN,
    BOOLEAN,
    CONDITIONAL,
    HALF,
    LAYOUT,
    NARROW_SCALARS,
    OPERATIONS,
    Number,
    Rule,
    div_by_number,
    nan_to_num_of,
    of_half,
    power_of,
    triton_type,
)

_DIVISIONS = (ATEN.div.Tensor, ATEN.div.Scalar)


@dataclass(frozen=True)
class Slot:
    """A number that is one for all tensors.

    Attributes:
        name: of the variable that it is loaded to.
        text: what is computed once.
        dtype: what it is stored as: a bool is an int32.
    """

    name: str
    text: str
    dtype: torch.dtype

    @property
    def stored(self) -> str:
        """The Triton type that it has in memory."""
        return "tl.int32" if self.dtype == torch.bool else triton_type(self.dtype)


class Code:
    """The lines of a program.

    Attributes:
        once: assignments to the variables that are one for all tensors.
        update: assignments to those of elements.
        slots: what the latter read of the former.

    Raises:
        UnsupportedError: there is no Triton code for an operation or a dtype.
    """

    def __init__(self, graph: Graph) -> None:
        self.once: list[str] = []
        self.update: list[str] = []
        self._slots: dict[str, Slot] = {}
        for node in graph.nodes:
            if node.op == "call_function":
                lines = self.once if is_shared(node) else self.update
                lines.append(f"{variable(node)} = {self._expression(node)}")

    @property
    def slots(self) -> list[Slot]:
        """In the order of their places in memory."""
        return list(self._slots.values())

    def slot(self, text: str, dtype: torch.dtype) -> str:
        """The variable of the update in which it finds what is computed once as ``text``."""
        if text not in self._slots:
            self._slots[text] = Slot(f"slot{len(self._slots)}", text, dtype)
        return self._slots[text].name

    def result(self, node: Node, dtype: torch.dtype) -> str:
        """What is stored to an operand of ``dtype``: a node's value, converted as ATen does it."""
        if is_shared(node):
            return self.slot(convert(variable(node), dtype_of(node), dtype), dtype)
        return convert(variable(node), dtype_of(node), dtype, packed=True)

    def condition(self, node: Node) -> str:
        """What the update asks before it stores anything."""
        return self.slot(convert(variable(node), dtype_of(node), torch.bool), torch.bool)

    def _expression(self, node: Node) -> str:
        if node.target not in OPERATIONS:
            raise UnsupportedError(f"there is no Triton code for {node.target}")
        reader = _Reader(self, node)
        arguments = [reader.read(arg, i) for i, arg in enumerate(node.args)]
        named = {k: reader.read(v) for k, v in node.kwargs.items() if k not in LAYOUT}
        try:
            text = _rule(node)(*arguments, **named)
        except TypeError as error:  # an argument that the function here does not have
            raise UnsupportedError(f"there is no Triton code for {node.format_node()}") from error
        made = torch.bool if node.target in BOOLEAN else reader.compute
        return convert(f"({text})", made, dtype_of(node), packed=not is_shared(node))


class _Reader:
    """Reads the arguments of one operation.

    Attributes:
        compute: the dtype that ATen computes in.
    """

    def __init__(self, code: Code, node: Node) -> None:
        self._code, self._node = code, node
        self._common = _common_dtype(node)
        self.compute = torch.float32 if self._common in HALF else self._common
        self._narrow = self._common if node.target in NARROW_SCALARS else self.compute

    def read(self, arg: Any, position: int = -1) -> Any:
        """The text of an argument, in ``compute``; the condition of a choice is a bool."""
        is_divisor = position == 1 and self._node.target in _DIVISIONS
        if isinstance(arg, Node):
            asked = CONDITIONAL.get(self._node.target) == position
            dtype = torch.bool if asked else self.compute
            text = self._inverse(arg) if is_divisor and _is_float(arg) else self._text(arg, asked)
            is_slot = is_shared(arg) and not is_shared(self._node)
            return self._code.slot(text, dtype) if is_slot else text
        if isinstance(arg, (bool, int, float)):
            value = torch.tensor(float(arg), dtype=torch.float64, device="cpu")
            value = value.reciprocal() if is_divisor else value
            return Number(value.to(self._narrow).item(), triton_type(self.compute))
        return arg

    def _inverse(self, scalar: Node) -> str:
        return f"inverse({variable(scalar)}, {triton_type(self.compute)})"

    def _text(self, arg: Node, asked: bool) -> str:
        compute, narrow, packed = self.compute, self._narrow, not is_shared(arg)
        if _is_float(arg):
            text = f"tl.cast({variable(arg)}, {triton_type(compute)})"
            return convert(convert(text, compute, narrow), narrow, compute)
        if asked:
            return convert(variable(arg), dtype_of(arg), torch.bool, packed)
        text = convert(variable(arg), dtype_of(arg), self._common, packed)
        return convert(text, self._common, compute, packed)


def variable(node: Node) -> str:
    """The name of a node's value; a prefix keeps it apart from every other name."""
    return f"_{node.name}"


def is_shared(node: Node) -> bool:
    """Whether a node's value is one for all tensors."""
    value = node.meta["val"]
    return not isinstance(value, Tensor) or value.dim() == 0


def convert(text: str, source: torch.dtype, dtype: torch.dtype, packed: bool = False) -> str:
    """A value of ``source`` as one of ``dtype``, as ATen converts it.

    Args:
        text: the value.
        source: what it is.
        dtype: what it is to be.
        packed: whether it is one of many, in a kernel that has ``PACKED``.
    """
    triton_type(source)
    if source == dtype:
        return text
    if source == torch.float64 and dtype in HALF:  # ATen goes through float32
        text, source = f"{text}.to(tl.float32)", torch.float32
    if dtype == torch.bool:
        return f"({text} != 0)"
    if packed and source == torch.float32 and dtype in HALF:
        return f"narrowed({text}, {triton_type(dtype)}, PACKED)"
    if packed and source in HALF and dtype == torch.float32:
        return f"widened({text}, PACKED)"
    return f"{text}.to({triton_type(dtype)})"


def _rule(node: Node) -> Rule:
    divides = node.target in _DIVISIONS
    if node.target is ATEN.pow.Tensor_Scalar:
        return power_of(_common_dtype(node))
    if node.target is ATEN.nan_to_num.default:
        return nan_to_num_of(_common_dtype(node))
    if divides and (not isinstance(node.args[1], Node) or _is_float(node.args[1])):
        return div_by_number
    if not is_shared(node) and dtype_of(node) in HALF:
        return of_half(node.target, dtype_of(node))
    return OPERATIONS[node.target]


def _common_dtype(node: Node) -> torch.dtype:
    """The dtype that ATen reads the arguments of an operation in."""
    if node.target is ATEN._to_copy.default:
        return dtype_of(node.args[0])  # type: ignore[arg-type]
    if node.target not in BOOLEAN:
        return dtype_of(node)
    values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    return torch.result_type(values[0], values[-1])


def _is_float(node: Node) -> bool:
    return isinstance(node.meta["val"], float)
