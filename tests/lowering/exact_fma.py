"""Fused multiply-adds in numpy, rounded once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def fma(x: Array, y: Array, z: Array) -> Array:
    """``x * y + z`` of float32 or float64 arrays or numbers."""
    dtype = np.result_type(x, y, z)
    x, y, z = np.broadcast_arrays(*(np.asarray(a, dtype=dtype) for a in (x, y, z)))
    with np.errstate(all="ignore"):
        return _fma32(x, y, z) if dtype == np.float32 else _fma64(x, y, z)


def _fma32(x: Array, y: Array, z: Array) -> Array:
    """A product of two float32 is a float64; the sum is rounded to odd, and that to float32."""
    product, other = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    high, low = _two_sum(product, other)
    return _to_odd(high, low).astype(np.float32)


def _fma64(x: Array, y: Array, z: Array) -> Array:
    """S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums" (2008)."""
    high, low = _two_product(x, y)
    sum_high, sum_low = _two_sum(z, low)
    top, rest = _two_sum(high, sum_high)
    result = top + _to_odd(*_two_sum(sum_low, rest))
    sizes = np.abs(np.stack((x, y, z)))
    plain = ~np.isfinite(sizes).all(0) | (x == 0) | (y == 0)
    infinite = np.isfinite(x) & np.isfinite(y) & np.isinf(z)  # however large the product is
    result = np.where(plain, np.where(infinite, z, x * y + z), result)
    odd = ~plain & ((sizes > 2.0**400) | ((sizes < 2.0**-400) & (sizes > 0))).any(0)
    for i in np.argwhere(odd):
        at = tuple(i)
        result[at] = _rounded(Fraction(float(x[at])) * Fraction(float(y[at])), float(z[at]))
    return result


def _rounded(product: Fraction, other: float) -> float:
    exact = product + Fraction(other)
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    high_a, low_a = _split(a)
    high_b, low_b = _split(b)
    product = a * b
    error = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
    return product, error


def _split(a: Array) -> tuple[Array, Array]:
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


def _to_odd(value: Array, error: Array) -> Array:
    """What is cut off of ``value + error`` decides its last digit: another rounding is exact."""
    value = np.ascontiguousarray(value)
    bits = value.view(np.int64).copy()
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(value) & (bits & 1 == 0)
    away = np.signbit(error) == np.signbit(value)
    return (bits + np.where(inexact, np.where(away, 1, -1), 0)).view(np.float64)
