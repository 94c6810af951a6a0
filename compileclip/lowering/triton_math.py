"""Functions that generated kernels call: ATen's arithmetic where one operator of Triton is not it.

Arguments are float32 or float64, blocks or scalars.
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
def lerp(start: tl.tensor, end: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """From start to end by weight, from whichever is nearer."""
    way = end - start
    near_start = tl.fma(weight, way, start)
    near_end = tl.fma(way, weight - 1.0, end)
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
