"""A model of how ATen's CUDA kernels round, on a CPU: written from their source, not from ours.

Read in pytorch/aten/src/ATen/native, versions 2.8 to 2.11: ``cuda/BinaryDivTrueKernel.cu``,
``cuda/BinaryMulKernel.cu``, ``ufunc/add.h``, ``cuda/DeviceAddCmulCdiv.cuh``, ``cuda/Lerp.cu``,
``cuda/PowKernel.cu``, ``cuda/TensorCompare.cu``, ``cuda/CompareKernels.cu``. nvcc contracts a
product and a sum of one expression. ``opmath`` is float32 for float16 and bfloat16, which are
rounded as they are stored. A scalar of the host is taken in opmath; narrower where that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from exact_fma import fma
from torch import Tensor
from torch.fx import Node

from compileclip.lowering.program import Program

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


class Numbers:
    """The arguments of an operation on tensors of one dtype, as its kernel reads them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.opmath = np.float64 if dtype == torch.float64 else np.float32

    def read(self, value: Any) -> Any:
        """A tensor or a scalar, in opmath."""
        if isinstance(value, Tensor):
            wide = value.to(torch.float64 if self.opmath is np.float64 else torch.float32)
            return wide.numpy()
        return self.opmath(value)

    def narrow(self, value: Any) -> Any:
        """A scalar that is taken in the tensor's dtype, in opmath."""
        return self.read(torch.tensor(value, dtype=torch.float64).to(self.dtype))

    def store(self, value: Any) -> Tensor:
        """The result, rounded to the dtype."""
        return torch.from_numpy(np.ascontiguousarray(value)).to(self.dtype)


def add(n: Numbers, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """``self + alpha * other``, ``ufunc/add.h``."""
    return n.store(fma(n.read(alpha), n.read(b), n.read(a)))


def sub(n: Numbers, a: Any, b: Any, alpha: float = 1) -> Tensor:
    """``add`` with ``-alpha``."""
    return add(n, a, b, -alpha)


def rsub(n: Numbers, a: Any, b: Any, alpha: float = 1) -> Tensor:
    return sub(n, b, a, alpha)


def mul(n: Numbers, a: Any, b: Any) -> Tensor:
    return n.store(n.read(a) * n.read(b))


def div(n: Numbers, a: Any, b: Any) -> Tensor:
    """By a scalar of the host: a product with ``opmath(double(1) / scalar)``."""
    if isinstance(b, Tensor):
        return n.store(n.read(a) / n.read(b))
    return n.store(n.read(a) * n.read(float(np.float64(1.0) / np.float64(b))))


def power(n: Numbers, a: Any, exponent: float) -> Tensor:
    """``pow_tensor_scalar_kernel_impl``: a square is rounded to the dtype before a cube is made."""
    base = n.read(a)
    square = n.read(n.store(base * base))
    results: dict[float, Callable[[], Any]] = {
        2: lambda: square,
        3: lambda: square * base,
        -2: lambda: 1 / square,
        -1: lambda: 1 / base,
        0.5: lambda: np.sqrt(base),
    }
    return n.store(results[exponent]())


def clamp(n: Numbers, a: Any, least: float | None = None, most: float | None = None) -> Tensor:
    """NaN comes through."""
    value = n.read(a)
    value = value if least is None else np.maximum(value, n.read(least))
    return n.store(value if most is None else np.minimum(value, n.read(most)))


def lerp(n: Numbers, start: Any, end: Any, weight: Any) -> Tensor:
    """From whichever is nearer, ``Lerp.h``."""
    a, b, w = n.read(start), n.read(end), n.read(weight)
    near_end = fma(-(b - a), n.opmath(1) - w, b)
    return n.store(np.where(np.abs(w) < 0.5, fma(w, b - a, a), near_end))


def addcmul(n: Numbers, a: Any, b: Any, c: Any, value: float = 1) -> Tensor:
    """A factor of 1 is left out, ``DeviceAddCmulCdiv.cuh``."""
    x, y, z = n.read(a), n.read(b), n.read(c)
    factor = n.read(value)
    return n.store(fma(y, z, x) if factor == 1 else fma(factor, y * z, x))


def addcdiv(n: Numbers, a: Any, b: Any, c: Any, value: float = 1) -> Tensor:
    return n.store(fma(n.read(value), n.read(b) / n.read(c), n.read(a)))


def compared(operation: Callable[[Any, Any], Any]) -> Callable[..., Tensor]:
    """A scalar is taken in the tensor's dtype."""

    def compare(n: Numbers, a: Any, b: Any) -> Tensor:
        other = n.read(b) if isinstance(b, Tensor) else n.narrow(b)
        return torch.from_numpy(np.asarray(operation(n.read(a), other)))

    return compare


def clamp_between(n: Numbers, a: Any, least: Any = None, most: Any = None) -> Tensor:
    """NaN of any of the three comes through."""
    value = n.read(a)
    value = value if least is None else np.maximum(value, n.read(least))
    return n.store(value if most is None else np.minimum(value, n.read(most)))


def nan_to_num(
    n: Numbers, a: Any, nan: float = 0.0, most: float | None = None, least: float | None = None
) -> Tensor:
    """What takes the place of NaN and infinities is of the tensor's dtype."""
    info, value = torch.finfo(n.dtype), n.read(a)
    high = n.narrow(info.max if most is None else most)
    low = n.narrow(info.min if least is None else least)
    value = np.where(np.isnan(value), n.narrow(nan), value)
    return n.store(np.where(value == np.inf, high, np.where(value == -np.inf, low, value)))


def where(n: Numbers, condition: Tensor, a: Any, b: Any) -> Tensor:
    return n.store(np.where(condition.numpy(), n.read(a), n.read(b)))


MODEL: dict[Any, Callable[..., Tensor]] = {
    aten.abs.default: lambda n, a: n.store(np.abs(n.read(a))),
    aten.neg.default: lambda n, a: n.store(-n.read(a)),
    aten.reciprocal.default: lambda n, a: n.store(n.opmath(1) / n.read(a)),
    aten.sqrt.default: lambda n, a: n.store(np.sqrt(n.read(a))),
    aten.sign.default: lambda n, a: n.store(np.nan_to_num(np.sign(n.read(a)), nan=0.0)),
    aten.add.Tensor: add,
    aten.sub.Tensor: sub,
    aten.rsub.Scalar: rsub,
    aten.mul.Tensor: mul,
    aten.div.Tensor: div,
    aten.pow.Tensor_Scalar: power,
    aten.clamp.default: clamp,
    aten.maximum.default: lambda n, a, b: n.store(np.maximum(n.read(a), n.read(b))),
    aten.minimum.default: lambda n, a, b: n.store(np.minimum(n.read(a), n.read(b))),
    aten.lerp.Scalar: lerp,
    aten.addcmul.default: addcmul,
    aten.addcdiv.default: addcdiv,
    aten.where.self: where,
    aten.where.ScalarOther: where,
    aten.full_like.default: lambda n, a, s: torch.full_like(a, s),
    aten.clone.default: lambda n, a: a.clone(),
    aten.sgn.default: lambda n, a: n.store(np.nan_to_num(np.sign(n.read(a)), nan=0.0)),
    aten.floor.default: lambda n, a: n.store(np.floor(n.read(a))),
    aten.ceil.default: lambda n, a: n.store(np.ceil(n.read(a))),
    aten.trunc.default: lambda n, a: n.store(np.trunc(n.read(a))),
    aten.frac.default: lambda n, a: n.store(n.read(a) - np.trunc(n.read(a))),
    aten.relu.default: lambda n, a: clamp(n, a, 0.0),
    aten.nan_to_num.default: nan_to_num,
    aten.clamp.Tensor: clamp_between,
    aten.clamp_min.Tensor: clamp_between,
    aten.clamp_max.Tensor: lambda n, a, most: clamp_between(n, a, None, most),
    aten.masked_fill.Scalar: lambda n, a, mask, s: n.store(np.where(mask, n.narrow(s), n.read(a))),
    aten.isinf.default: lambda n, a: a.isinf(),
    aten.isnan.default: lambda n, a: a.isnan(),
    aten.bitwise_and.Tensor: lambda n, a, b: a & b,
    aten.bitwise_or.Tensor: lambda n, a, b: a | b,
    aten.bitwise_xor.Tensor: lambda n, a, b: a ^ b,
    aten.bitwise_not.default: lambda n, a: ~a,
    aten.logical_xor.default: lambda n, a, b: (a != 0) ^ (b != 0),
    aten.isfinite.default: lambda n, a: torch.from_numpy(np.isfinite(n.read(a))),
    aten.logical_and.default: lambda n, a, b: (a != 0) & (b != 0),
    aten.logical_or.default: lambda n, a, b: (a != 0) | (b != 0),
    aten.logical_not.default: lambda n, a: a == 0,
}
_COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater}
_COMPARISONS |= {"lt": np.less, "ge": np.greater_equal, "le": np.less_equal}
MODEL |= {
    getattr(getattr(aten, name), overload): compared(operation)
    for name, operation in _COMPARISONS.items()
    for overload in ("Scalar", "Tensor")
}


def run_model(
    program: Program, tensors: dict[str, Tensor], scalars: dict[str, float]
) -> dict[str, Tensor]:
    """What ATen's CUDA kernels would store; as ``lowering_programs.run_eager``."""
    found: dict[Node, Any] = {}
    with np.errstate(all="ignore"):
        for node in program.graph.nodes:
            if node.op == "placeholder":
                found[node] = {**tensors, **scalars}[node.name]
            elif node.op == "call_function":
                found[node] = _called(node, found)
    pairs = zip(program.stored, program.results, strict=True)
    return {k: found[node].to(tensors[k].dtype) for k, node in pairs}


def _called(node: Node, found: dict[Node, Any]) -> Tensor:
    args = [found[a] if isinstance(a, Node) else a for a in node.args]
    kwargs = {k: found[v] if isinstance(v, Node) else v for k, v in node.kwargs.items()}
    if node.target is aten._to_copy.default:
        return args[0].to(kwargs["dtype"])
    kept = {k: v for k, v in kwargs.items() if k in ("alpha", "value")}
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.dtype != torch.bool]
    dtype = node.meta["val"].dtype
    dtype = dtypes[0] if dtype == torch.bool and dtypes else dtype
    dtype = torch.float32 if dtype == torch.bool else dtype  # masks alone, which are not rounded
    return MODEL[node.target](Numbers(dtype), *args, **kept)
