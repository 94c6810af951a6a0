"""What each ATen operation is in C++, rounded as ATen's CPU kernels round it.

A value is computed in ``T``: double for float64, float for float32 and the half types, bool for
bool. Half precision results are rounded to their dtype after each operation, as ATen does. Each
formula was read off ATen's results (torch 2.13.0, AVX-512), bit by bit, see
``tests/test_lowering_cpp.py``; only these differ from eager:

* ``sqrt`` and powers of +-0.5 are correctly rounded; ATen's float32 and float64 on x86 are not.
* ``exp``, ``log`` and other powers call the C library, not ATen's vector library: some results
  differ in the last digit. Loops with them are not vectorized.
* the sign of a NaN, and which of two zeros of unlike sign ``maximum`` and ``minimum`` return.
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
    aten.clamp_max.default: "minimum",
    aten.clamp_min.default: "maximum",
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
    aten.pow.Scalar: "pow",
    aten.pow.Tensor_Scalar: "pow",
    aten.pow.Tensor_Tensor: "pow",
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
EXACT = {"absolute", "clamp", "maximum", "minimum", "neg", "sign", "where"}

# ATen reads a 0-dim tensor or a number beside half precision tensors in float32 in these, and
# rounds it first in the others.
WIDE = {"add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge"}

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
using f16 = _Float16;

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
INLINE float of_bits(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// A value rounded to the dtype S: as a number, and as what lies in memory.
template <class S> INLINE float round_to(float x) {
  if constexpr (std::is_same_v<S, f16>) {
    return static_cast<float>(static_cast<f16>(x));
  } else {
    const uint32_t b = bits_of(x);
    const uint32_t even = (b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u;
    return of_bits(x != x ? 0x7fc00000u : even);
  }
}
INLINE void store(double* p, double x) { *p = x; }
INLINE void store(float* p, float x) { *p = x; }
INLINE void store(bool* p, bool x) { *p = x; }
INLINE void store(f16* p, float x) { *p = static_cast<f16>(x); }
INLINE void store(bf16* p, float x) { p->bits = bits_of(round_to<bf16>(x)) >> 16; }
INLINE double load(const double* p) { return *p; }
INLINE float load(const float* p) { return *p; }
INLINE bool load(const bool* p) { return *p; }
INLINE float load(const f16* p) { return static_cast<float>(*p); }
INLINE float load(const bf16* p) { return of_bits(static_cast<uint32_t>(p->bits) << 16); }

namespace op {
#define OP template <class T> INLINE T
#define TEST template <class T> INLINE bool
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
OP pow(T a, T e) {
  if (e == T(2)) return a * a;
  if (e == T(1)) return a;
  if (e == T(3)) return a * a * a;
  if (e == T(0.5)) return std::sqrt(a);
  if (e == T(-0.5)) return T(1) / std::sqrt(a);
  if (e == T(-1)) return T(1) / a;
  if (e == T(-2)) return T(1) / (a * a);
  return std::pow(a, e);
}
// A NaN on either side comes through.
OP maximum(T a, T b) { return a < b || b != b ? b : a; }
OP minimum(T a, T b) { return a > b || b != b ? b : a; }
OP clamp(T a, T low, T high) { return minimum(maximum(a, low), high); }
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

FRAME = r"""
#include <algorithm>
#include <omp.h>

$PRELUDE

struct Launch {
$MEMBERS
};

static Launch prepare(const double* scalars, const uint64_t* values) {
$PREPARE
  return Launch{$MEMBER_NAMES};
}

INLINE void run(const Launch& launch, int64_t count, $POINTERS) {
$LOCALS
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
$EACH
  }
}

static void walk(const Launch& launch, const uint64_t* const* tables, const int64_t* sizes,
                 const int64_t* first, int64_t tensors, int64_t begin, int64_t end) {
  if (begin >= end) return;
  int64_t tensor = std::upper_bound(first, first + tensors + 1, end - 1) - first - 1;
  for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
    while (chunk < first[tensor]) --tensor;
    const int64_t start = (chunk - first[tensor]) * $CHUNK_SIZE;
    const int64_t count = std::min<int64_t>($CHUNK_SIZE, sizes[tensor] - start);
    run(launch, count, $CHUNK_POINTERS);
  }
}

static bool is_small(int64_t tensors, const int64_t* sizes) {
  int64_t elements = 0;
  for (int64_t i = 0; i < tensors && elements < $GRAIN; ++i) elements += sizes[i];
  return elements < $GRAIN;
}

extern "C" void step(const uint64_t* const* tables, int64_t tensors, const int64_t* sizes,
                     const int64_t* first, const double* scalars, const uint64_t* values,
                     int threads) {
  const int64_t total = first[tensors];
  const Launch launch = prepare(scalars, values);
  if (threads <= 1 || is_small(tensors, sizes)) {
    walk(launch, tables, sizes, first, tensors, 0, total);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), thread = omp_get_thread_num();
    walk(launch, tables, sizes, first, tensors, thread * total / count,
         (thread + 1) * total / count);
  }
}
"""
