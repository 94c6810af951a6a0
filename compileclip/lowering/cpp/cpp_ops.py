"""What each ATen operation is in C++, rounded as ATen's CPU kernels round it.

A value is computed in double for float64, in float for float32 and the half types, in bool for
bool. Half precision results are rounded to their dtype after each operation, as ATen does. Each
formula was read off ATen's results (torch 2.13.0, AVX-512) bit by bit; the tests repeat that.
These differ from eager:

* ``sqrt``, and ``pow`` by +-0.5 in float32 and float64, are correctly rounded; ATen's are not on
  x86, where they come from MKL.
* Transcendental functions and powers other than +-0.5, +-1, +-2 and 3 call the C library, ATen its
  vector library: the last digits may differ. Loops with them are not vectorized.
* ATen itself computes a few operations otherwise in the scalar tail of a loop, the last elements
  of a tensor, than in the vectorized part. Here all elements are as in the vectorized part. It
  concerns ``add`` with ``alpha`` of a number or 0-dim tensor (no FMA in the tail), the sign of zero
  in ``lerp`` by 1 and in ``maximum`` and ``minimum`` of two zeros, and in half precision ``add``
  and ``sub`` with ``alpha``, and ``rsqrt``.
* the sign and the payload of a NaN.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

# Operation -> the function of ``cpp_prelude.py``, which takes the operation's tensors and numbers
# in the order of its schema.
FUNCTIONS = {
    aten._to_copy.default: "same",
    aten.abs.default: "absolute",
    aten.acos.default: "acos",
    aten.add.Scalar: "add",
    aten.add.Tensor: "add",
    aten.addcdiv.default: "addcdiv",
    aten.addcmul.default: "addcmul",
    aten.asin.default: "asin",
    aten.atan.default: "atan",
    aten.atan2.default: "atan2",
    aten.bitwise_and.Tensor: "logical_and",
    aten.bitwise_not.default: "logical_not",
    aten.bitwise_or.Tensor: "logical_or",
    aten.bitwise_xor.Tensor: "logical_xor",
    aten.ceil.default: "ceil",
    aten.clamp.default: "clamp",
    aten.clamp.Tensor: "clamp_between",
    aten.clamp_max.default: "clamp_max",
    aten.clamp_max.Tensor: "minimum",
    aten.clamp_min.default: "clamp_min",
    aten.clamp_min.Tensor: "maximum",
    aten.clone.default: "same",
    aten.copysign.Scalar: "copysign",
    aten.copysign.Tensor: "copysign",
    aten.cos.default: "cos",
    aten.div.Scalar: "div",
    aten.div.Tensor: "div",
    aten.eq.Scalar: "eq",
    aten.eq.Tensor: "eq",
    aten.exp.default: "exp",
    aten.exp2.default: "exp2",
    aten.expm1.default: "expm1",
    aten.floor.default: "floor",
    aten.frac.default: "frac",
    aten.full_like.default: "second",
    aten.ge.Scalar: "ge",
    aten.ge.Tensor: "ge",
    aten.gt.Scalar: "gt",
    aten.gt.Tensor: "gt",
    aten.hypot.default: "hypot",
    aten.isfinite.default: "isfinite",
    aten.isinf.default: "isinf",
    aten.isnan.default: "isnan",
    aten.le.Scalar: "le",
    aten.le.Tensor: "le",
    aten.lerp.Scalar: "lerp",
    aten.lerp.Tensor: "lerp",
    aten.log.default: "log",
    aten.log10.default: "log10",
    aten.log1p.default: "log1p",
    aten.log2.default: "log2",
    aten.logical_and.default: "logical_and",
    aten.logical_not.default: "logical_not",
    aten.logical_or.default: "logical_or",
    aten.logical_xor.default: "logical_xor",
    aten.lt.Scalar: "lt",
    aten.lt.Tensor: "lt",
    aten.masked_fill.Scalar: "masked_fill",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.mul.Scalar: "mul",
    aten.mul.Tensor: "mul",
    aten.nan_to_num.default: "nan_to_num",
    aten.ne.Scalar: "ne",
    aten.ne.Tensor: "ne",
    aten.neg.default: "neg",
    aten.pow.Scalar: "power",
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "power",
    aten.reciprocal.default: "reciprocal",
    aten.relu.default: "relu",
    aten.round.default: "round",
    aten.rsqrt.default: "rsqrt",
    aten.rsub.Scalar: "rsub",
    aten.rsub.Tensor: "rsub",
    aten.sgn.default: "sign",
    aten.sigmoid.default: "sigmoid",
    aten.sign.default: "sign",
    aten.sin.default: "sin",
    aten.softplus.default: "softplus",
    aten.sqrt.default: "sqrt",
    aten.sub.Scalar: "sub",
    aten.sub.Tensor: "sub",
    aten.tan.default: "tan",
    aten.tanh.default: "tanh",
    aten.trunc.default: "trunc",
    aten.where.Scalar: "where",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.where.self: "where",
}

# Results that are one of the arguments, but for the sign: nothing to round.
EXACT = {"absolute", "clamp", "clamp_max", "clamp_min", "maximum", "minimum", "neg"}
EXACT |= {"ceil", "clamp_between", "copysign", "floor", "frac", "masked_fill"}
EXACT |= {"nan_to_num", "relu", "round", "same", "second", "sign", "trunc", "where"}

# Where ATen takes a number or a 0-dim tensor beside half precision tensors as it is, in float32;
# everywhere else it rounds it to half precision first.
WIDE = {("mul", "other"), ("div", "other"), ("lerp", "weight")}
WIDE |= {("addcmul", "value"), ("addcdiv", "value")}
WIDE |= {("softplus", "beta"), ("softplus", "threshold")}

# What has a bool result and does not compare: computed in bool.
MOVES = {aten.clone.default, aten._to_copy.default, aten.full_like.default} | {
    overload for overload, function in FUNCTIONS.items() if function in ("where", "masked_fill")
}

HALF = {torch.bfloat16, torch.float16}

TYPES = {
    torch.float64: ("double", "double"),  # in memory, in registers
    torch.float32: ("float", "float"),
    torch.bfloat16: ("bf16", "float"),
    torch.float16: ("f16", "float"),
    torch.bool: ("bool", "bool"),
}
