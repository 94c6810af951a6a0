"""What each ATen operation is in C++, rounded as ATen's CPU kernels round it.

A value is computed in double for float64, in float for float32 and the half types, in bool for
bool. Half precision results are rounded to their dtype after each operation, as ATen does. Each
formula was read off ATen's results (torch 2.13.0, AVX-512) bit by bit; the tests repeat that.
These differ from eager:

* ``sqrt``, and ``pow`` by +-0.5 in float32 and float64, are correctly rounded; ATen's are not on
  x86, where they come from MKL.
* ``exp``, ``log`` and powers other than +-0.5, +-1, +-2 and 3 call the C library, ATen its vector
  library: the last digit may differ. Loops with them are not vectorized.
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

# Operation -> the function of PRELUDE, which takes the operation's tensors and numbers in the order
# of its schema.
FUNCTIONS = {
    aten.abs.default: "absolute",
    aten.add.Scalar: "add",
    aten.add.Tensor: "add",
    aten.addcdiv.default: "addcdiv",
    aten.addcmul.default: "addcmul",
    aten.clamp.default: "clamp",
    aten.clamp_max.default: "clamp_max",
    aten.clamp_min.default: "clamp_min",
    aten.clone.default: "same",
    aten._to_copy.default: "same",
    aten.div.Scalar: "div",
    aten.div.Tensor: "div",
    aten.eq.Scalar: "eq",
    aten.eq.Tensor: "eq",
    aten.exp.default: "exp",
    aten.full_like.default: "second",
    aten.ge.Scalar: "ge",
    aten.ge.Tensor: "ge",
    aten.gt.Scalar: "gt",
    aten.gt.Tensor: "gt",
    aten.isfinite.default: "isfinite",
    aten.le.Scalar: "le",
    aten.le.Tensor: "le",
    aten.lerp.Scalar: "lerp",
    aten.lerp.Tensor: "lerp",
    aten.log.default: "log",
    aten.logical_and.default: "logical_and",
    aten.logical_not.default: "logical_not",
    aten.logical_or.default: "logical_or",
    aten.lt.Scalar: "lt",
    aten.lt.Tensor: "lt",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.mul.Scalar: "mul",
    aten.mul.Tensor: "mul",
    aten.ne.Scalar: "ne",
    aten.ne.Tensor: "ne",
    aten.neg.default: "neg",
    aten.pow.Scalar: "power",
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "power",
    aten.reciprocal.default: "reciprocal",
    aten.rsqrt.default: "rsqrt",
    aten.rsub.Scalar: "rsub",
    aten.rsub.Tensor: "rsub",
    aten.sign.default: "sign",
    aten.sqrt.default: "sqrt",
    aten.sub.Scalar: "sub",
    aten.sub.Tensor: "sub",
    aten.where.Scalar: "where",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.where.self: "where",
}

# Results that are one of the arguments, but for the sign: nothing to round.
EXACT = {"absolute", "clamp", "clamp_max", "clamp_min", "maximum", "minimum", "neg"}
EXACT |= {"same", "second", "sign", "where"}

# Where ATen takes a number or a 0-dim tensor beside half precision tensors as it is, in float32;
# everywhere else it rounds it to half precision first.
WIDE = {("mul", "other"), ("div", "other"), ("lerp", "weight")}
WIDE |= {("addcmul", "value"), ("addcdiv", "value")}

# What has a bool result and does not compare: computed in bool.
MOVES = {aten.clone.default, aten._to_copy.default, aten.full_like.default} | {
    overload for overload, function in FUNCTIONS.items() if function == "where"
}

HALF = {torch.bfloat16, torch.float16}

TYPES = {
    torch.float64: ("double", "double"),  # in memory, in registers
    torch.float32: ("float", "float"),
    torch.bfloat16: ("bf16", "float"),
    torch.float16: ("f16", "float"),
    torch.bool: ("bool", "bool"),
}

PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
INLINE float of_bits(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// A value rounded to half precision S, to the nearest and to even: g++ vectorizes this, unlike
// conversions to _Float16 and back.
template <class S> INLINE float round_to(float x) {
  const uint32_t b = bits_of(x);
  if constexpr (std::is_same_v<S, bf16>) {
    const uint32_t even = (b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u;
    return of_bits(x != x ? 0x7fc00000u : even);
  } else {
    // A sum with a number whose last digit is worth 2^-10 of x's first, or 2^-24, rounds x there.
    const float size = of_bits(b & 0x7fffffffu);
    const uint32_t exponent = b & 0x7f800000u, least = 0x38800000u;
    const float shift = of_bits((exponent > least ? exponent : least) + (13u << 23));
    const float even = (size + shift) - shift;
    const float finite = size >= 65536.0f ? INFINITY : even >= 65536.0f ? INFINITY : even;
    return of_bits(bits_of(finite) | (b & 0x80000000u));
  }
}
INLINE void store(double* p, double x) { *p = x; }
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(bool* p, bool x) { *p = x; }
INLINE void store(bf16* p, float x) { p->bits = bits_of(round_to<bf16>(x)) >> 16; }
INLINE void store(f16* p, float x) {
  const uint32_t b = bits_of(round_to<f16>(x)), size = b & 0x7fffffffu;
  const uint32_t normal = (size - (112u << 23)) >> 13;
  const uint32_t small = bits_of(of_bits(size) + 0.5f) - bits_of(0.5f);  // in units of 2^-24
  const uint32_t finite = size < 0x38800000u ? small : normal;
  const uint32_t whole = size > 0x7f800000u ? 0x7e00u : size == 0x7f800000u ? 0x7c00u : finite;
  p->bits = (b >> 16 & 0x8000u) | whole;
}
INLINE double load(const double* p) { return *p; }
INLINE float load(const float* p) { return *p; }
INLINE bool load(const bool* p) { return *p; }
INLINE float load(const bf16* p) { return of_bits(static_cast<uint32_t>(p->bits) << 16); }
INLINE float load(const f16* p) {
  const uint32_t h = p->bits, size = h & 0x7fffu;
  const uint32_t normal = (size << 13) + ((size < 0x7c00u ? 112u : 224u) << 23);
  const uint32_t small = bits_of(of_bits(bits_of(0.5f) + size) - 0.5f);
  return of_bits((h & 0x8000u) << 16 | (size < 0x0400u ? small : normal));
}

// T: the type in registers, S: in memory.
namespace op {
#define OP template <class T, class S = T> INLINE T
#define TEST template <class T, class S = T> INLINE bool
OP same(T a) { return a; }
OP second(T, T b) { return b; }
OP absolute(T a) { return std::fabs(a); }
OP neg(T a) { return -a; }
OP sign(T a) { return static_cast<T>(T(0) < a) - static_cast<T>(a < T(0)); }
OP add(T a, T b, T alpha = 1) { return std::fma(b, alpha, a); }
OP sub(T a, T b, T alpha = 1) { return std::fma(b, -alpha, a); }
OP rsub(T a, T b, T alpha = 1) { return std::fma(a, -alpha, b); }
OP mul(T a, T b) { return a * b; }
OP div(T a, T b) { return a / b; }
OP reciprocal(T a) { return T(1) / a; }
OP sqrt(T a) { return std::sqrt(a); }
OP rsqrt(T a) { return T(1) / std::sqrt(a); }
OP exp(T a) { return std::exp(a); }
OP log(T a) { return std::log(a); }
OP power(T a, T e) { return std::pow(a, e); }
OP pow(T a, T e) {
  // ATen rounds a square in bfloat16; it has no square roots for float16 but calls pow itself.
  const T square = std::is_same_v<S, bf16> ? round_to<bf16>(a * a) : a * a;
  const T root_of = !std::is_same_v<S, f16> ? a : a == T(-INFINITY) ? T(INFINITY) : a + T(0);
  if (e == T(2)) return square;
  if (e == T(1)) return a;
  if (e == T(3)) return square * a;
  if (e == T(0.5)) return std::sqrt(root_of);
  if (e == T(-0.5)) return T(1) / std::sqrt(root_of);
  if (e == T(-1)) return T(1) / a;
  if (e == T(-2)) return T(1) / square;
  return std::pow(a, e);
}
// A NaN on either side comes through; of equal values, the second.
OP maximum(T a, T b) { return a > b || a != a ? a : b; }
OP minimum(T a, T b) { return a < b || a != a ? a : b; }
OP clamp_min(T a, T low) { return maximum(low, a); }
OP clamp_max(T a, T high) { return minimum(high, a); }
OP clamp(T a, T low, T high) { return clamp_max(clamp_min(a, low), high); }
OP lerp(T a, T b, T weight) {
  const bool small = std::fabs(weight) < T(0.5);
  return std::fma(small ? weight : weight - T(1), b - a, small ? a : b);
}
OP addcmul(T a, T b, T c, T value) { return std::fma(value * b, c, a); }
OP addcdiv(T a, T b, T c, T value) { return a + value * b / c; }
OP where(bool condition, T a, T b) { return condition ? a : b; }
TEST eq(T a, T b) { return a == b; }
TEST ne(T a, T b) { return a != b; }
TEST lt(T a, T b) { return a < b; }
TEST le(T a, T b) { return a <= b; }
TEST gt(T a, T b) { return a > b; }
TEST ge(T a, T b) { return a >= b; }
TEST isfinite(T a) { return std::fabs(a) < T(INFINITY); }
TEST logical_not(T a) { return a == T(0); }
TEST logical_and(T a, T b) { return a != T(0) && b != T(0); }
TEST logical_or(T a, T b) { return a != T(0) || b != T(0); }
}  // namespace op
"""
