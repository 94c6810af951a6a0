"""What a program's C++ begins with: numbers in memory, and the operations of ``cpp_ops.py``."""

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
OP exp2(T a) { return std::exp2(a); }
OP expm1(T a) { return std::expm1(a); }
OP log2(T a) { return std::log2(a); }
OP log10(T a) { return std::log10(a); }
OP log1p(T a) { return std::log1p(a); }
OP sin(T a) { return std::sin(a); }
OP cos(T a) { return std::cos(a); }
OP tan(T a) { return std::tan(a); }
OP asin(T a) { return std::asin(a); }
OP acos(T a) { return std::acos(a); }
OP atan(T a) { return std::atan(a); }
OP atan2(T a, T b) { return std::atan2(a, b); }
OP tanh(T a) { return std::tanh(a); }
OP hypot(T a, T b) { return std::hypot(a, b); }
OP sigmoid(T a) { return T(1) / (T(1) + std::exp(-a)); }
OP softplus(T a, T beta, T threshold) {
  return a * beta > threshold ? a : std::log1p(std::exp(a * beta)) / beta;
}
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
OP clamp_between(T a, T low, T high) { return minimum(maximum(a, low), high); }
OP relu(T a) { return clamp_min(a, T(0)); }
OP floor(T a) { return std::floor(a); }
OP ceil(T a) { return std::ceil(a); }
OP trunc(T a) { return std::trunc(a); }
OP frac(T a) { return a - std::trunc(a); }
OP round(T a) { return std::nearbyint(a); }
OP copysign(T a, T b) { return std::copysign(a, b); }
OP nan_to_num(T a, T nan, T most, T least) {
  return a != a ? nan : a == T(INFINITY) ? most : a == T(-INFINITY) ? least : a;
}
OP lerp(T a, T b, T weight) {
  const bool small = std::fabs(weight) < T(0.5);
  return std::fma(small ? weight : weight - T(1), b - a, small ? a : b);
}
OP addcmul(T a, T b, T c, T value) { return std::fma(value * b, c, a); }
OP addcdiv(T a, T b, T c, T value) { return a + value * b / c; }
OP where(bool condition, T a, T b) { return condition ? a : b; }
OP masked_fill(T a, bool mask, T value) { return mask ? value : a; }
TEST eq(T a, T b) { return a == b; }
TEST ne(T a, T b) { return a != b; }
TEST lt(T a, T b) { return a < b; }
TEST le(T a, T b) { return a <= b; }
TEST gt(T a, T b) { return a > b; }
TEST ge(T a, T b) { return a >= b; }
TEST isfinite(T a) { return std::fabs(a) < T(INFINITY); }
TEST isinf(T a) { return std::fabs(a) == T(INFINITY); }
TEST isnan(T a) { return a != a; }
TEST logical_not(T a) { return a == T(0); }
TEST logical_and(T a, T b) { return a != T(0) && b != T(0); }
TEST logical_or(T a, T b) { return a != T(0) || b != T(0); }
TEST logical_xor(T a, T b) { return (a != T(0)) != (b != T(0)); }
}  // namespace op
"""
