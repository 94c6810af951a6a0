"""What each ATen operation is in Triton, rounded as ATen's CUDA kernel rounds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from compileclip.fallback import UnsupportedError

ATEN = torch.ops.aten

_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.bool: "tl.int1",
}
HALF = (torch.float16, torch.bfloat16)
Rule = Callable[..., str]  # from the text of the arguments to that of the result


def triton_type(dtype: torch.dtype) -> str:
    """The name of a dtype in Triton."""
    if dtype not in _TYPES:
        raise UnsupportedError(f"there is no Triton code for {dtype}")
    return _TYPES[dtype]


class Number(str):
    """A number written in the program, as a constant of Triton."""

    value: float

    def __new__(cls, value: float, dtype: str) -> Number:
        """The constant of a number in Triton's ``dtype``."""
        digits = repr(value) if math.isfinite(value) else f"float('{value}')"
        text = f"tl.full((), {digits}, {dtype})"
        if digits == "-0.0":
            text = f"({text} * -1.0)"  # Triton's constant would be 0
        made = super().__new__(cls, text)
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


_QUOTIENT, _QUOTIENT_OF_FLOAT16 = "quotient({}, {})", "quotient_of_float16({}, {}, PACKED)"


def _div(x: str, y: str, quotient: str = _QUOTIENT) -> str:
    return quotient.format(x, y)


def div_by_number(x: str, inverse: str) -> str:
    """A number of the host is an operand of no division: ATen takes its reciprocal in float64."""
    return f"{x} * {inverse}"


def power_of(dtype: torch.dtype) -> Rule:
    """``pow`` of a tensor of ``dtype`` by a number."""
    return _template(f"power({{}}, {{}}, {triton_type(dtype)})", 2)


def _addcmul(x: str, y: str, z: str, value: str = "") -> str:
    return f"addcmul({x}, {y}, {z}, {value})" if value else f"tl.fma({y}, {z}, {x})"


def _addcdiv(x: str, y: str, z: str, value: str = "", quotient: str = _QUOTIENT) -> str:
    divided = quotient.format(y, z)
    return f"tl.fma({value}, {divided}, {x})" if value else f"{x} + {divided}"


def _softplus(x: str, beta: str = "1.0", threshold: str = "20.0") -> str:
    return f"softplus({x}, {beta}, {threshold})"


def nan_to_num_of(dtype: torch.dtype) -> Rule:
    """``nan_to_num`` of a tensor of ``dtype``, whose ends are what replaces infinities."""
    limits = torch.finfo(dtype)

    def rule(x: str, nan: Any = None, posinf: Any = None, neginf: Any = None) -> str:
        nan = "0.0" if nan is None else nan
        posinf = repr(limits.max) if posinf is None else posinf
        neginf = repr(limits.min) if neginf is None else neginf
        return f"nan_to_num({x}, {nan}, {posinf}, {neginf})"

    return rule


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
_FILL = ATEN.masked_fill.Scalar
_LIBRARY = ["acos", "asin", "atan", "cos", "exp", "exp2", "expm1", "log", "log10", "log1p", "log2"]
_LIBRARY += ["sin", "tan", "tanh"]
OPERATIONS: dict[Any, Rule] = {
    ATEN.abs.default: _template("tl.abs({})", 1),
    ATEN.neg.default: _template("{} * -1.0", 1),  # Triton's minus takes 0 from 0 to +0
    ATEN.reciprocal.default: _template("reciprocal({})", 1),
    ATEN.sqrt.default: _template("square_root({})", 1),
    ATEN.rsqrt.default: _template("tl.rsqrt({})", 1),
    **{getattr(ATEN, name).default: _template(f"libdevice.{name}({{}})", 1) for name in _LIBRARY},
    ATEN.sigmoid.default: _template("sigmoid({})", 1),
    ATEN.softplus.default: _softplus,
    ATEN.atan2.default: _template("libdevice.atan2({}, {})", 2),
    ATEN.hypot.default: _template("libdevice.hypot({}, {})", 2),
    ATEN.sign.default: _template("sign({})", 1),
    ATEN.sgn.default: _template("sign({})", 1),
    ATEN.floor.default: _template("tl.floor({})", 1),
    ATEN.ceil.default: _template("tl.ceil({})", 1),
    ATEN.trunc.default: _template("trunc({})", 1),
    ATEN.frac.default: _template("frac({})", 1),
    ATEN.round.default: _template("libdevice.rint({})", 1),
    ATEN.relu.default: _template("maximum({}, 0.0)", 1),
    ATEN.copysign.Tensor: _template("libdevice.copysign({}, {})", 2),
    ATEN.copysign.Scalar: _template("libdevice.copysign({}, {})", 2),
    ATEN.nan_to_num.default: _template("nan_to_num({}, {}, {}, {})", 4),  # see nan_to_num_of
    ATEN.pow.Tensor_Scalar: _template("power({}, {}, {})", 3),  # with the dtype, see power_of
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
    ATEN.clamp.Tensor: _clamp,
    ATEN.clamp_min.Tensor: _template("maximum({}, {})", 2),
    ATEN.clamp_max.Tensor: _template("minimum({}, {})", 2),
    ATEN.lerp.Scalar: _template("lerp({}, {}, {})", 3),
    ATEN.lerp.Tensor: _template("lerp({}, {}, {})", 3),
    ATEN.addcmul.default: _addcmul,
    ATEN.addcdiv.default: _addcdiv,
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
_LOGICAL = {
    ATEN.isfinite.default: _template("tl.abs({}) < float('inf')", 1),
    ATEN.isinf.default: _template("tl.abs({}) == float('inf')", 1),
    ATEN.isnan.default: _template("{0} != {0}", 1),
    ATEN.logical_and.default: _template("({} != 0) & ({} != 0)", 2),
    ATEN.logical_or.default: _template("({} != 0) | ({} != 0)", 2),
    ATEN.logical_xor.default: _template("({} != 0) ^ ({} != 0)", 2),
    ATEN.logical_not.default: _template("{} == 0", 1),
    # Of masks alone: there is no Triton code for integers.
    ATEN.bitwise_and.Tensor: _template("({} != 0) & ({} != 0)", 2),
    ATEN.bitwise_or.Tensor: _template("({} != 0) | ({} != 0)", 2),
    ATEN.bitwise_xor.Tensor: _template("({} != 0) ^ ({} != 0)", 2),
    ATEN.bitwise_not.default: _template("{} == 0", 1),
}
_CHOICES = {
    getattr(ATEN.where, name): _WHERE for name in ("self", "Scalar", "ScalarSelf", "ScalarOther")
}
OPERATIONS |= _COMPARISONS | _LOGICAL | _CHOICES | {_FILL: _template("tl.where({1}, {2}, {0})", 3)}
BOOLEAN = {*_COMPARISONS, *_LOGICAL}
# The place of the argument that is a mask.
CONDITIONAL = dict.fromkeys(_CHOICES, 0) | {_FILL: 1}
# Here ATen takes a scalar in the tensor's dtype, elsewhere in the one that it computes in.
NARROW_SCALARS = {*_COMPARISONS, ATEN.pow.Tensor_Scalar, ATEN.pow.Scalar}
# How the result lies in memory; its dtype is in the node's metadata.
LAYOUT = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")


def of_half(target: Any, dtype: torch.dtype) -> Rule:
    """An operation on elements of half precision: for some, more than float32 can have is known."""
    if target is ATEN.sqrt.default:
        return _template(f"root_of_half({{}}, {triton_type(dtype)}, PACKED)", 1)
    if dtype == torch.float16 and target in (ATEN.div.Tensor, ATEN.addcdiv.default):
        return _of_float16(OPERATIONS[target])
    return OPERATIONS[target]


def _of_float16(rule: Rule) -> Rule:
    """A rule with a division, of float16."""

    def with_quotients(*arguments: str, **named: str) -> str:
        return rule(*arguments, **named, quotient=_QUOTIENT_OF_FLOAT16)

    return with_quotients
