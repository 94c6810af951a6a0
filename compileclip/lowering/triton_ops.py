"""What each ATen operation is in Triton, rounded as ATen's CUDA kernel rounds it.

A node is a variable of its own dtype. An operation reads its arguments in the dtype that ATen
promotes them to, computes in the dtype that ATen computes in (float32 for 16 bits), and rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from compileclip.lowering import UnsupportedError
from compileclip.program import dtype_of

ATEN = torch.ops.aten

_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.bool: "tl.int1",
}
_HALF = (torch.float16, torch.bfloat16)
Rule = Callable[..., str]  # from the text of the arguments to that of the result


def triton_type(dtype: torch.dtype) -> str:
    """The name of a dtype in Triton."""
    if dtype not in _TYPES:
        raise UnsupportedError(f"there is no Triton code for {dtype}")
    return _TYPES[dtype]


def variable(node: Node) -> str:
    """The name of a node's value; a prefix keeps it apart from every other name."""
    return f"_{node.name}"


def to_dtype(node: Node, dtype: torch.dtype) -> str:
    """A node's value, converted as ATen converts it."""
    return _convert(variable(node), dtype_of(node), dtype)


def statements(graph: Graph, wanted: Sequence[Node] | None = None) -> list[str]:
    """One assignment per operation of a program, or for those alone that ``wanted`` follow from."""
    calls = [n for n in graph.nodes if n.op == "call_function"]
    if wanted is not None:
        needed = set(wanted)
        for node in reversed(calls):
            if node in needed:
                needed.update(node.all_input_nodes)
        calls = [n for n in calls if n in needed]
    return [f"{variable(n)} = {_expression(n)}" for n in calls]


def _convert(text: str, source: torch.dtype, dtype: torch.dtype) -> str:
    triton_type(source)
    if source == dtype:
        return text
    if source == torch.float64 and dtype in _HALF:  # ATen goes through float32
        text = f"{text}.to(tl.float32)"
    if dtype == torch.bool:
        return f"({text} != 0)"
    return f"{text}.to({triton_type(dtype)})"


def _expression(node: Node) -> str:
    if node.target not in OPERATIONS:
        raise UnsupportedError(f"there is no Triton code for {node.target}")
    common = _common_dtype(node)
    compute = torch.float32 if common in _HALF else common
    narrow = common if node.target in _NARROW_SCALARS else compute

    def read(arg: Any, position: int = -1) -> Any:
        if isinstance(arg, Node):
            if isinstance(arg.meta["val"], float):
                text = f"tl.cast({variable(arg)}, {triton_type(compute)})"
                return _convert(_convert(text, compute, narrow), narrow, compute)
            if position == 0 and node.target in _CONDITIONAL:
                return to_dtype(arg, torch.bool)
            return _convert(to_dtype(arg, common), common, compute)
        if isinstance(arg, (bool, int, float)):
            return Number(torch.tensor(float(arg), dtype=narrow).item(), triton_type(compute))
        return arg

    arguments = [read(arg, i) for i, arg in enumerate(node.args)]
    named = {k: read(v) for k, v in node.kwargs.items() if k not in _LAYOUT}
    try:
        text = _rule(node)(*arguments, **named)
    except TypeError as error:  # an argument that the function here does not have
        raise UnsupportedError(f"there is no Triton code for {node.format_node()}") from error
    made = torch.bool if node.target in _BOOLEAN else compute
    return _convert(f"({text})", made, dtype_of(node))


def _rule(node: Node) -> Rule:
    if node.target is ATEN.pow.Tensor_Scalar:
        return _template(f"power({{}}, {{}}, {triton_type(_common_dtype(node))})", 2)
    divisor = node.args[1] if node.target in (ATEN.div.Tensor, ATEN.div.Scalar) else None
    if isinstance(divisor, Node) and not isinstance(divisor.meta["val"], float):
        return _div
    return _div_scalar if divisor is not None else OPERATIONS[node.target]


def _common_dtype(node: Node) -> torch.dtype:
    """The dtype that ATen reads the arguments of an operation in."""
    if node.target is ATEN._to_copy.default:
        return dtype_of(node.args[0])  # type: ignore[arg-type]
    if node.target not in _BOOLEAN:
        return dtype_of(node)
    values: list[Any] = [a.meta["val"] if isinstance(a, Node) else a for a in node.args]
    return torch.result_type(values[0], values[-1])


class Number(str):
    """A number written in the program, as a constant of Triton."""

    value: float

    def __new__(cls, value: float, dtype: str) -> Number:
        """The constant of a number in Triton's ``dtype``."""
        digits = repr(value) if math.isfinite(value) else f"float('{value}')"
        made = super().__new__(cls, f"tl.full((), {digits}, {dtype})")
        made.value = value
        return made


def _is_one(number: str) -> bool:
    return isinstance(number, Number) and number.value == 1


def _add(x: str, y: str, alpha: str = "") -> str:
    if not alpha or _is_one(alpha):
        return f"{x} + {y}"
    return f"tl.fma({alpha}, {y}, {x})"


def _sub(x: str, y: str, alpha: str = "") -> str:
    if not alpha or _is_one(alpha):
        return f"{x} - {y}"
    return f"tl.fma({alpha}, {y} * -1.0, {x})"


def _rsub(x: str, y: str, alpha: str = "") -> str:
    return _sub(y, x, alpha)


def _clamp(x: str, least: str | None = None, most: str | None = None) -> str:
    x = x if least is None else f"maximum({x}, {least})"
    return x if most is None else f"minimum({x}, {most})"


def _div(x: str, y: str) -> str:
    return f"quotient({x}, {y})"


def _div_scalar(x: str, y: str) -> str:
    return f"{x} * reciprocal({y})"


def _addcmul(x: str, y: str, z: str, value: str = "") -> str:
    return f"addcmul({x}, {y}, {z}, {value})" if value else f"tl.fma({y}, {z}, {x})"


def _addcdiv(x: str, y: str, z: str, value: str = "") -> str:
    return f"tl.fma({value}, quotient({y}, {z}), {x})" if value else f"{x} + quotient({y}, {z})"


def _template(text: str, arity: int) -> Rule:
    def rule(*arguments: str) -> str:
        if len(arguments) != arity:
            raise TypeError(text)
        return text.format(*arguments)

    return rule


def _binary(operator: str) -> Rule:
    return _template(f"{{}} {operator} {{}}", 2)


_SAME = _template("{}", 1)
_MUL, _WHERE = _binary("*"), _template("tl.where({}, {}, {})", 3)
OPERATIONS: dict[Any, Rule] = {
    ATEN.abs.default: _template("tl.abs({})", 1),
    ATEN.neg.default: _template("{} * -1.0", 1),  # Triton's minus takes 0 from 0 to +0
    ATEN.reciprocal.default: _template("reciprocal({})", 1),
    ATEN.sqrt.default: _template("square_root({})", 1),
    ATEN.rsqrt.default: _template("tl.rsqrt({})", 1),
    ATEN.exp.default: _template("libdevice.exp({})", 1),
    ATEN.log.default: _template("libdevice.log({})", 1),
    ATEN.sign.default: _template("sign({})", 1),
    ATEN.pow.Tensor_Scalar: _template("power({}, {}, {})", 3),  # with the dtype, see _rule
    ATEN.pow.Scalar: _template("libdevice.pow({}, {})", 2),
    ATEN.pow.Tensor_Tensor: _template("libdevice.pow({}, {})", 2),
    ATEN.add.Tensor: _add,
    ATEN.add.Scalar: _add,
    ATEN.sub.Tensor: _sub,
    ATEN.sub.Scalar: _sub,
    ATEN.rsub.Tensor: _rsub,
    ATEN.rsub.Scalar: _rsub,
    ATEN.mul.Tensor: _MUL,
    ATEN.mul.Scalar: _MUL,
    ATEN.div.Tensor: _div,
    ATEN.div.Scalar: _div,
    ATEN.maximum.default: _template("maximum({}, {})", 2),
    ATEN.minimum.default: _template("minimum({}, {})", 2),
    ATEN.clamp.default: _clamp,
    ATEN.clamp_min.default: _template("maximum({}, {})", 2),
    ATEN.clamp_max.default: _template("minimum({}, {})", 2),
    ATEN.lerp.Scalar: _template("lerp({}, {}, {})", 3),
    ATEN.lerp.Tensor: _template("lerp({}, {}, {})", 3),
    ATEN.addcmul.default: _addcmul,
    ATEN.addcdiv.default: _addcdiv,
    ATEN.isfinite.default: _template("tl.abs({}) < float('inf')", 1),
    ATEN.logical_and.default: _template("({} != 0) & ({} != 0)", 2),
    ATEN.logical_or.default: _template("({} != 0) | ({} != 0)", 2),
    ATEN.logical_not.default: _template("{} == 0", 1),
    ATEN.full_like.default: _template("{1}", 2),
    ATEN.clone.default: _SAME,
    ATEN._to_copy.default: _SAME,
}
_COMPARISONS = {
    getattr(getattr(ATEN, name), overload): _binary(operator)
    for name, operator in zip(
        ("eq", "ne", "gt", "lt", "ge", "le"), ("==", "!=", ">", "<", ">=", "<="), strict=True
    )
    for overload in ("Scalar", "Tensor")
}
_CONDITIONAL = {
    getattr(ATEN.where, name): _WHERE for name in ("self", "Scalar", "ScalarSelf", "ScalarOther")
}
OPERATIONS |= _COMPARISONS | _CONDITIONAL
_LOGICAL = (ATEN.logical_and.default, ATEN.logical_or.default, ATEN.logical_not.default)
_BOOLEAN = {*_COMPARISONS, *_LOGICAL, ATEN.isfinite.default}
# Here ATen takes a scalar in the tensor's dtype, elsewhere in the one that it computes in.
_NARROW_SCALARS = {*_COMPARISONS, ATEN.pow.Tensor_Scalar}
# How the result lies in memory; its dtype is in the node's metadata.
_LAYOUT = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")
