"""Each operation that a lowering has code for, in a program of its own, and small optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lowering_programs import program
from torch.fx import Proxy

from compileclip.lowering.program import Program

aten = torch.ops.aten
Build = Callable[[Proxy, Proxy, Proxy, Proxy], Proxy]

CASES: dict[str, Build] = {
    "abs": lambda x, y, z, s: aten.abs.default(x),
    "neg": lambda x, y, z, s: aten.neg.default(x),
    "reciprocal": lambda x, y, z, s: aten.reciprocal.default(x),
    "sqrt": lambda x, y, z, s: aten.sqrt.default(x),
    "rsqrt": lambda x, y, z, s: aten.rsqrt.default(x),
    "sign": lambda x, y, z, s: aten.sign.default(x),
    "pow 2": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, 2),
    "pow 3": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, 3),
    "pow -2": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, -2),
    "pow 0.5": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, 0.5),
    "pow -1": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, -1.0),
    "add": lambda x, y, z, s: aten.add.Tensor(x, y),
    "add alpha": lambda x, y, z, s: aten.add.Tensor(x, y, alpha=-0.3),
    "add scalar": lambda x, y, z, s: aten.add.Tensor(x, s),
    "sub alpha": lambda x, y, z, s: aten.sub.Tensor(x, y, alpha=s),
    "rsub": lambda x, y, z, s: aten.rsub.Scalar(x, s),
    "mul": lambda x, y, z, s: aten.mul.Tensor(x, y),
    "mul then add": lambda x, y, z, s: aten.add.Tensor(aten.mul.Tensor(x, y), z),
    "mul scalar": lambda x, y, z, s: aten.mul.Tensor(x, s),
    "div": lambda x, y, z, s: aten.div.Tensor(x, y),
    "div scalar": lambda x, y, z, s: aten.div.Tensor(x, s),
    "maximum": lambda x, y, z, s: aten.maximum.default(x, y),
    "minimum": lambda x, y, z, s: aten.minimum.default(x, y),
    "clamp": lambda x, y, z, s: aten.clamp.default(x, -0.5, s),
    "clamp most": lambda x, y, z, s: aten.clamp.default(x, None, 1.0),
    "lerp near": lambda x, y, z, s: aten.lerp.Scalar(x, y, 0.1),
    "lerp far": lambda x, y, z, s: aten.lerp.Scalar(x, y, s),
    "addcmul": lambda x, y, z, s: aten.addcmul.default(x, y, z, value=s),
    "addcmul 1": lambda x, y, z, s: aten.addcmul.default(x, y, z),
    "addcdiv": lambda x, y, z, s: aten.addcdiv.default(x, y, z, value=-0.01),
    "where": lambda x, y, z, s: aten.where.self(aten.gt.Tensor(x, y), y, z),
    "where scalar": lambda x, y, z, s: aten.where.ScalarOther(aten.le.Scalar(x, s), y, 0.5),
    "eq": lambda x, y, z, s: aten.mul.Tensor(aten.eq.Scalar(x, 0), y),
    "logical": lambda x, y, z, s: aten.where.self(
        aten.logical_or.default(
            aten.logical_and.default(aten.isfinite.default(x), aten.ne.Tensor(y, z)),
            aten.logical_not.default(aten.lt.Scalar(z, s)),
        ),
        x,
        aten.full_like.default(x, 0.25),
    ),
    "sgn": lambda x, y, z, s: aten.sgn.default(x),
    "floor": lambda x, y, z, s: aten.floor.default(x),
    "ceil": lambda x, y, z, s: aten.ceil.default(x),
    "trunc": lambda x, y, z, s: aten.trunc.default(x),
    "frac": lambda x, y, z, s: aten.frac.default(x),
    "relu": lambda x, y, z, s: aten.relu.default(x),
    "nan_to_num": lambda x, y, z, s: aten.nan_to_num.default(x),
    "nan_to_num 3": lambda x, y, z, s: aten.nan_to_num.default(x, 0.7, s, -2.5),
    "clamp between": lambda x, y, z, s: aten.clamp.Tensor(x, y, z),
    "clamp below": lambda x, y, z, s: aten.clamp.Tensor(x, None, z),
    "clamp_min": lambda x, y, z, s: aten.clamp_min.Tensor(x, y),
    "clamp_max": lambda x, y, z, s: aten.clamp_max.Tensor(x, y),
    "masked_fill": lambda x, y, z, s: aten.masked_fill.Scalar(x, aten.gt.Tensor(y, z), s),
    "masks": lambda x, y, z, s: aten.masked_fill.Scalar(
        x,
        aten.bitwise_xor.Tensor(
            aten.bitwise_and.Tensor(aten.isinf.default(x), aten.lt.Tensor(y, z)),
            aten.bitwise_or.Tensor(
                aten.bitwise_not.default(aten.isnan.default(y)), aten.logical_xor.default(x, z)
            ),
        ),
        0.25,
    ),
    "copies": lambda x, y, z, s: aten._to_copy.default(
        aten.clone.default(aten._to_copy.default(x, dtype=torch.float64)), dtype=torch.float32
    ),
}
LIBRARY: dict[str, Build] = {  # of transcendental functions
    "exp": lambda x, y, z, s: aten.exp.default(x),
    "log": lambda x, y, z, s: aten.log.default(x),
    "pow": lambda x, y, z, s: aten.pow.Tensor_Scalar(x, s),
    "exp2": lambda x, y, z, s: aten.exp2.default(x),
    "expm1": lambda x, y, z, s: aten.expm1.default(x),
    "log2": lambda x, y, z, s: aten.log2.default(x),
    "log10": lambda x, y, z, s: aten.log10.default(x),
    "log1p": lambda x, y, z, s: aten.log1p.default(x),
    "sin": lambda x, y, z, s: aten.sin.default(x),
    "cos": lambda x, y, z, s: aten.cos.default(x),
    "tan": lambda x, y, z, s: aten.tan.default(x),
    "asin": lambda x, y, z, s: aten.asin.default(x),
    "acos": lambda x, y, z, s: aten.acos.default(x),
    "atan": lambda x, y, z, s: aten.atan.default(x),
    "tanh": lambda x, y, z, s: aten.tanh.default(x),
    "sigmoid": lambda x, y, z, s: aten.sigmoid.default(x),
    "softplus": lambda x, y, z, s: aten.softplus.default(x),
    "softplus 2": lambda x, y, z, s: aten.softplus.default(x, s, 1.7),
    "atan2": lambda x, y, z, s: aten.atan2.default(x, y),
    "hypot": lambda x, y, z, s: aten.hypot.default(x, y),
    "round": lambda x, y, z, s: aten.round.default(x),  # exact, but the interpreter has no rint
    "copysign": lambda x, y, z, s: aten.copysign.Tensor(x, y),  # likewise
}
SCALARS = {"s": 0.734375}  # a float32, and no weight below a half


def one_operation(build: Build, dtype: torch.dtype) -> Program:
    """``out = build(x, y, z, s)``."""

    def stores(x: Proxy, y: Proxy, z: Proxy, out: Proxy, s: Proxy) -> dict[str, Proxy]:
        return {"out": build(x, y, z, s)}

    return program(stores, dict.fromkeys(("x", "y", "z", "out"), dtype), SCALARS)


def sgd(dtype: torch.dtype) -> Program:
    """SGD with momentum and weight decay."""

    def build(
        param: Proxy, grad: Proxy, buf: Proxy, decay: Proxy, momentum: Proxy, lr: Proxy
    ) -> dict[str, Proxy]:
        grad = aten.add.Tensor(grad, param, alpha=decay)
        buf = aten.add.Tensor(aten.mul.Tensor(buf, momentum), grad)
        return {"buf": buf, "param": aten.add.Tensor(param, buf, alpha=lr)}

    scalars = {"decay": 0.01, "momentum": 0.9, "lr": -0.1}
    return program(build, dict.fromkeys(("param", "grad", "buf"), dtype), scalars)


def rmsprop(dtype: torch.dtype) -> Program:
    """RMSprop, centered, maximizing."""

    def build(
        param: Proxy, grad: Proxy, square: Proxy, mean: Proxy, alpha: Proxy, rest: Proxy, lr: Proxy
    ) -> dict[str, Proxy]:
        grad = aten.neg.default(grad)
        square = aten.addcmul.default(aten.mul.Tensor(square, alpha), grad, grad, value=rest)
        mean = aten.lerp.Scalar(mean, grad, rest)
        spread = aten.addcmul.default(aten.add.Tensor(square, 2.0), mean, mean, value=-1)
        average = aten.add.Tensor(aten.sqrt.default(spread), 1e-8)
        param = aten.addcdiv.default(param, grad, average, value=lr)
        return {"param": param, "square": square, "mean": mean}

    operands = dict.fromkeys(("param", "grad", "square", "mean"), dtype)
    return program(build, operands, {"alpha": 0.99, "rest": 1 - 0.99, "lr": -0.01})
