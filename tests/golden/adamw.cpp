
#include <algorithm>
#include <omp.h>


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


constexpr int64_t CHUNK = 16384, RUN = 64, BLOCK = 32, AHEAD = 512, GRAIN = 32768;

struct Launch {
  double u0;
  float u1;
  float u2;
  float u3;
  float u4;
  float u5;
  float u6;
  float u7;
  float u8;
  float u9;
  float u10;
  float u11;
  float u12;
  float u13;
};

static Launch prepare(const double* scalars, const uint64_t* values) {
  const double u0 = load(reinterpret_cast<const double*>(values[0]));
  const float u1 = load(reinterpret_cast<const float*>(values[1]));
  const float u2 = op::same<float, float>(static_cast<float>(u0));
  const float u3 = op::add<float, float>(static_cast<float>(u1), static_cast<float>(0x1.0c6f7a0b5ed8dp-20), static_cast<float>(0x1.0000000000000p+0));
  const float u4 = op::reciprocal<float, float>(static_cast<float>(u3));
  const float u5 = op::mul<float, float>(static_cast<float>(u4), static_cast<float>(u2));
  const float u6 = op::clamp<float, float>(static_cast<float>(u5), static_cast<float>(-INFINITY), static_cast<float>(0x1.0000000000000p+0));
  const float u7 = static_cast<float>(scalars[0]);
  const float u8 = static_cast<float>(scalars[1]);
  const float u9 = static_cast<float>(scalars[2]);
  const float u10 = static_cast<float>(scalars[3]);
  const float u11 = static_cast<float>(scalars[4]);
  const float u12 = static_cast<float>(scalars[5]);
  const float u13 = static_cast<float>(scalars[6]);
  return Launch{u0, u1, u2, u3, u4, u5, u6, u7, u8, u9, u10, u11, u12, u13};
}

template <class S> INLINE void fetch(const S* block) {
  const char* const bytes = reinterpret_cast<const char*>(block);
  for (int64_t k = 0; k < BLOCK * int64_t(sizeof(S)); k += 64) __builtin_prefetch(bytes + k);
}

// The next ``count`` elements of a tensor, of which ``left`` are to come; the one after it begins
// at n0, n1 ...
INLINE void run(const Launch& launch, int64_t count, int64_t left, int64_t ahead, float* __restrict p0, float* __restrict p1, float* __restrict p2, float* __restrict p3,
                const float* n0, const float* n1, const float* n2, const float* n3) {
  const double u0 = launch.u0;
  const float u1 = launch.u1;
  const float u2 = launch.u2;
  const float u3 = launch.u3;
  const float u4 = launch.u4;
  const float u5 = launch.u5;
  const float u6 = launch.u6;
  const float u7 = launch.u7;
  const float u8 = launch.u8;
  const float u9 = launch.u9;
  const float u10 = launch.u10;
  const float u11 = launch.u11;
  const float u12 = launch.u12;
  const float u13 = launch.u13;
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int64_t end = std::min(begin + BLOCK, count), at = begin + ahead;
    fetch(at < left ? p0 + at : n0 + (at - left));
    fetch(at < left ? p1 + at : n1 + (at - left));
    fetch(at < left ? p2 + at : n2 + (at - left));
    fetch(at < left ? p3 + at : n3 + (at - left));
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float x0 = load(p0 + i);
      const float x1 = load(p1 + i);
      const float x2 = load(p2 + i);
      const float x3 = load(p3 + i);
      const float y4 = op::mul<float, float>(static_cast<float>(x1), static_cast<float>(u6));
      const float y5 = op::mul<float, float>(static_cast<float>(x0), u7);
      const float y6 = op::lerp<float, float>(static_cast<float>(x2), static_cast<float>(y4), u8);
      const float y7 = op::mul<float, float>(static_cast<float>(x3), u9);
      const float y8 = op::addcmul<float, float>(static_cast<float>(y7), static_cast<float>(y4), static_cast<float>(y4), u10);
      const float y9 = op::sqrt<float, float>(static_cast<float>(y8));
      const float y10 = op::div<float, float>(static_cast<float>(y9), u11);
      const float y11 = op::add<float, float>(static_cast<float>(y10), u12, static_cast<float>(0x1.0000000000000p+0));
      const float y12 = op::addcdiv<float, float>(static_cast<float>(y5), static_cast<float>(y6), static_cast<float>(y11), u13);
      store(p0 + i, y12);
      store(p2 + i, y6);
      store(p3 + i, y8);
    }
  }
}

static void walk(const Launch& launch, const uint64_t* table, const int64_t* sizes,
                 const int64_t* first, int64_t tensors, int64_t begin, int64_t end) {
  for (int64_t start, stop = end; stop > begin; stop = start) {
    start = std::max(begin, stop - RUN);
    int64_t tensor = std::upper_bound(first, first + tensors + 1, start) - first - 1;
    for (int64_t chunk = start; chunk < stop; ++tensor) {
      const int64_t last = std::min(stop, first[tensor + 1]);
      const int64_t from = (chunk - first[tensor]) * CHUNK, left = sizes[tensor] - from;
      const int64_t count = std::min((last - chunk) * CHUNK, left);
      const int64_t ahead = std::min(AHEAD, sizes[tensor]);
      const int64_t next = std::min(tensor + 1, tensors - 1);
      run(launch, count, left, ahead, reinterpret_cast<float*>(table[0 * tensors + tensor]) + from, reinterpret_cast<float*>(table[1 * tensors + tensor]) + from, reinterpret_cast<float*>(table[2 * tensors + tensor]) + from, reinterpret_cast<float*>(table[3 * tensors + tensor]) + from, reinterpret_cast<float*>(table[0 * tensors + next]), reinterpret_cast<float*>(table[1 * tensors + next]), reinterpret_cast<float*>(table[2 * tensors + next]), reinterpret_cast<float*>(table[3 * tensors + next]));
      chunk = last;
    }
  }
}

static bool is_small(int64_t tensors, const int64_t* sizes) {
  int64_t elements = 0;
  for (int64_t i = 0; i < tensors && elements < GRAIN; ++i) elements += sizes[i];
  return elements < GRAIN;
}

extern "C" void step(const uint64_t* table, int64_t tensors, const int64_t* sizes,
                     const int64_t* first, const double* scalars, const uint64_t* values,
                     int threads) {
  const int64_t total = first[tensors];
  const Launch launch = prepare(scalars, values);
  if (threads <= 1 || is_small(tensors, sizes)) {
    walk(launch, table, sizes, first, tensors, 0, total);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), thread = omp_get_thread_num();
    walk(launch, table, sizes, first, tensors, thread * total / count,
         (thread + 1) * total / count);
  }
}
