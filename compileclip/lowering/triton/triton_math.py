"""Functions that generated kernels call: ATen's arithmetic where one operator of Triton is not it.

Arguments are float32 or float64, blocks or scalars. With ``PACKED``, on NVIDIA's GPUs from sm_80
on, half precision is rounded and widened two elements at a time: the instruction that rounds one at
a time runs at an eighth of the rate, and took most of an update's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

# triton has no annotations, and where it is missing nothing is to be ignored.
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from triton.language.extra import libdevice  # type: ignore[import-untyped, unused-ignore]

_F = TypeVar("_F", bound=Callable[..., Any])
jit: Callable[[_F], _F] = triton.jit


@jit
def quotient(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The quotient, IEEE-rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:  # Triton's compiler follows this branch alone, or that one  # noqa: RET505
        return tl.div_rn(x, y)


@jit
def square_root(x: tl.tensor) -> tl.tensor:
    """The square root, IEEE-rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:  # noqa: RET505  # as above
        return tl.sqrt_rn(x)


@jit
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 / x, IEEE-rounded."""
    return quotient(tl.full((), 1.0, x.dtype), x)


@jit
def inverse(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:  # noqa: N803
    """1 / x of a float64 of the host, rounded to DTYPE."""
    return (1.0 / x).to(DTYPE)


@jit
def narrowed(x: tl.tensor, DTYPE: tl.constexpr, PACKED: tl.constexpr) -> tl.tensor:  # noqa: N803
    """A float32 rounded to bfloat16 or float16, to nearest and even."""
    if PACKED and len(x.shape) > 0:
        if DTYPE.is_bf16():
            result = tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.bfloat16, True, 2
            )
        else:
            result = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], tl.float16, True, 2
            )
    else:
        result = x.to(DTYPE)
    return result


@jit
def widened(x: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:  # noqa: N803
    """A bfloat16 or float16 as float32."""
    if PACKED and x.dtype == tl.bfloat16 and len(x.shape) > 0:
        result = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, True, 2
        )
    else:
        result = x.to(tl.float32)
    return result


@jit
def root_of_half(x: tl.tensor, DTYPE: tl.constexpr, PACKED: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The square root of a number of half precision, which is to be rounded to it.

    PTX promises sqrt.approx.f32 to 2**-23 of its value. No root of a bfloat16 lies nearer than
    2**-20 to the middle between two of them, without being there: the square of a middle has 18
    digits. So what it is rounded to is the same as of the correctly rounded root.

    A float16 is a normal float32, for which ``sqrt.rn.f32`` is no more than these four operations.
    """
    if PACKED and DTYPE.is_bf16():
        result = tl.sqrt(x)
    elif PACKED:
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1
        )
        near = x * inverse
        exact = tl.fma(tl.fma(near, near * -1.0, x), inverse * 0.5, near)
        result = tl.where((x == 0) | (x == float("inf")), x, exact)
    else:
        result = square_root(x)
    return result


@jit
def quotient_of_float16(x: tl.tensor, y: tl.tensor, PACKED: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The quotient of two float16, as an IEEE-rounded float32.

    Their exponents are far from the ends of float32's, so that ``div.rn.f32`` is no more than this:
    a reciprocal, improved, and a quotient, corrected twice. Where that is 0 or NaN, a zero or an
    infinity is among them and the first product is exact.
    """
    if PACKED:
        rough = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [y], tl.float32, True, 1
        )
        minus = y * -1.0
        inverse = tl.fma(rough, tl.fma(minus, rough, 1.0), rough)
        near = x * inverse
        near = tl.fma(inverse, tl.fma(minus, near, x), near)
        exact = tl.fma(inverse, tl.fma(minus, near, x), near)
        result = tl.where(tl.abs(exact) > 0, exact, x * rough)
    else:
        result = quotient(x, y)
    return result


@jit
def lerp(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """From start to end by weight, from whichever is nearer."""
    way = end - start
    near_start = tl.fma(weight, way, start)
    near_end = tl.fma(way, (1.0 - weight) * -1.0, end)  # by 1, the sign of a zero is this one's
    return tl.where(tl.abs(weight) < 0.5, near_start, near_end)


@jit
def addcmul(x: tl.tensor, y: tl.tensor, z: tl.tensor, value: tl.tensor) -> tl.tensor:
    """Value times y times z, added to x."""
    return tl.where(value == 1.0, tl.fma(y, z, x), tl.fma(value, y * z, x))


@jit
def power(x: tl.tensor, exponent: tl.tensor, NARROW: tl.constexpr) -> tl.tensor:  # noqa: N803
    """A power; ATen branches on the exponent too, which is one for all elements.

    A square is rounded to NARROW, the dtype of what is computed in that of x.
    """
    if exponent == 2.0:
        result = x * x
    elif exponent == 3.0:
        result = (x * x).to(NARROW).to(x.dtype) * x
    elif exponent == -2.0:
        result = reciprocal((x * x).to(NARROW).to(x.dtype))
    elif exponent == 0.5:
        result = square_root(x)
    elif exponent == -0.5:
        result = tl.rsqrt(x)
    elif exponent == -1.0:
        result = reciprocal(x)
    elif exponent == 1.0:
        result = x
    else:
        result = libdevice.pow(x, exponent)
    return result


@jit
def maximum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The greater one, or NaN where one is NaN."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@jit
def minimum(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The lesser one, or NaN where one is NaN."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@jit
def sign(x: tl.tensor) -> tl.tensor:
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@jit
def trunc(x: tl.tensor) -> tl.tensor:
    """Without its fraction."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@jit
def frac(x: tl.tensor) -> tl.tensor:
    """The fraction, with the sign."""
    return x - trunc(x)


@jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + e**-x)."""
    return reciprocal(1.0 + libdevice.exp(x * -1.0))


@jit
def softplus(x: tl.tensor, beta: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """log(1 + e**(beta x)) / beta; x itself where beta x is above the threshold."""
    scaled = x * beta
    soft = libdevice.log1p(libdevice.exp(scaled))
    return tl.where(scaled > threshold, x, quotient(soft, tl.zeros_like(x) + beta))


@jit
def nan_to_num(x: tl.tensor, nan: tl.tensor, most: tl.tensor, least: tl.tensor) -> tl.tensor:
    """A number in the place of NaN and of each infinity."""
    finite = tl.where(x == float("inf"), most, tl.where(x == float("-inf"), least, x))
    return tl.where(x != x, nan, finite)
