"""The C++ of ``cpp_norm.py``, where what it computes, and in which order, is said."""

from __future__ import annotations

from compileclip.lowering import CHUNK

SOURCE = r"""
#include <omp.h>  // headers of C++ itself would double the time to compile
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

constexpr int64_t CHUNK = @CHUNK@;
constexpr int64_t GRAIN = 32768;  // ATen's: for fewer elements a thread is not worth its start
constexpr int64_t AHEAD = 4096;  // bytes: so far a core does not fetch of itself
enum Status { OK, OUT_OF_RANGE, OUT_OF_MEMORY };

// No wider than a register of AVX2: g++ passes the halves of wider ones through memory.
typedef double Double4 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

// Per dtype: 4 elements as they are stored, and how they are widened.
struct Float32 {
  typedef Float4 stored;
#if defined(__AVX__) && !defined(__clang__)
  // One instruction, where g++ 12 makes three of it.
  static Double4 widen(Float4 x) { return __builtin_ia32_cvtps2pd256(x); }
#else
  static Double4 widen(Float4 x) { return __builtin_convertvector(x, Double4); }
#endif
};
struct Float64 {
  typedef Double4 stored;
  static Double4 widen(Double4 x) { return x; }
};
struct BFloat16 {
  typedef Half4 stored;
  static Double4 widen(Half4 x) {
    return Float32::widen((Float4)(__builtin_convertvector(x, UInt4) << 16));
  }
};
struct Float16 {
  typedef Half4 stored;
  // The sign goes. An addition rebiases the exponent, a second one that of inf and NaN. Subnormal
  // numbers get a leading 1 that is subtracted again: as floats none is subnormal, so that none
  // is lost where the CPU flushes those.
  static Double4 widen(Half4 x) {
    UInt4 bits = __builtin_convertvector(x, UInt4) & 0x7fff;
    const UInt4 small = (UInt4)(bits < 0x400), special = (UInt4)(bits >= 0x7c00);
    bits = (bits << 13) + (112u << 23) + (special & (112u << 23)) + (small & (1u << 23));
    return Float32::widen((Float4)bits - (Float4)(small & (113u << 23)));
  }
};

template <class T> static Double4 load(const char* data, int64_t count = 4) {
  typename T::stored x = {};
  memcpy(&x, data, count * (sizeof x / 4));  // at any address
  return T::widen(x);
}

static void prefetch(const char* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + at);
}

template <bool max, class V> static V join(V a, V b) {
  return max ? ((b > a) | (b != b) ? b : a) : a + b;  // NaN stays NaN
}

template <bool max> static void take(Double4& result, Double4 x) {
  result = join<max>(result, max ? (x < 0 ? -x : x) : x * x);
}

// The chunk that begins at element ``first`` of a tensor of n; after it comes the tensor ``next``.
template <class T, bool max>
static double reduce(const char* data, int64_t first, int64_t n, const char* next) {
  constexpr int64_t size = sizeof(typename T::stored) / 4;
  const int64_t left = (n - first) * size, ahead = n * size < AHEAD ? n * size : AHEAD;
  data += first * size;
  n = n - first < CHUNK ? n - first : CHUNK;
  Double4 lanes[8] = {};  // independent, to hide the latency of an operation
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const int64_t at = i * size + ahead;
    prefetch(at < left ? data + at : next + (at - left), 32 * size);
    for (int k = 0; k < 8; ++k) take<max>(lanes[k], load<T>(data + (i + 4 * k) * size));
  }
  for (int k = 0; i < n; ++k, i += 4)
    take<max>(lanes[k], load<T>(data + i * size, n - i < 4 ? n - i : 4));
  double result = 0.0;
  for (int k = 0; k < 2; ++k) {
    const Double4 last = join<max>(join<max>(lanes[k], lanes[k + 2]),
                                   join<max>(lanes[k + 4], lanes[k + 6]));
    for (int j = 0; j < 4; ++j) result = join<max>(result, last[j]);
  }
  return result;
}

struct List {
  int64_t n;
  const uint64_t* pointers;
  const int64_t *sizes, *first_chunk;
  const int8_t* dtypes;  // or null, and one for all
  int dtype;

  int dtype_of(int64_t i) const { return dtypes ? dtypes[i] : dtype; }

  template <bool max> double part(int64_t i, int64_t first) const {
    const char *data = (const char*)pointers[i], *next = (const char*)pointers[i + (i + 1 < n)];
    switch (dtype_of(i)) {
      case 0: return reduce<Float32, max>(data, first, sizes[i], next);
      case 1: return reduce<Float64, max>(data, first, sizes[i], next);
      case 2: return reduce<BFloat16, max>(data, first, sizes[i], next);
      default: return reduce<Float16, max>(data, first, sizes[i], next);
    }
  }

  template <bool max> void walk(int thread, int threads, double* parts) const {
    int64_t chunk = first_chunk[n] * thread / threads, low = 0, high = n;
    const int64_t end = first_chunk[n] * (thread + 1) / threads;
    while (high - low > 1) {  // first_chunk[low] <= chunk < first_chunk[high]
      const int64_t middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    for (; chunk < end; ++chunk) {
      while (first_chunk[low + 1] <= chunk) ++low;
      parts[chunk] = part<max>(low, (chunk - first_chunk[low]) * CHUNK);
    }
  }
};

template <bool max> static int norm(const List& list, void* out, int out_dtype, int threads) {
  const int64_t total = list.first_chunk[list.n];
  double* parts = (double*)malloc((total + 1) * sizeof(double));
  if (!parts) return OUT_OF_MEMORY;
  int64_t elements = 0;
  for (int64_t i = 0; i < list.n; ++i) elements += list.sizes[i];
  if (threads > total) threads = (int)total;
  if (threads <= 1 || elements < GRAIN) {
    list.walk<max>(0, 1, parts);
  } else {
#pragma omp parallel num_threads(threads)
    list.walk<max>(omp_get_thread_num(), omp_get_num_threads(), parts);
  }
  double result = 0.0;
  bool wide = false;
  for (int64_t i = 0, c = 0; i < list.n; ++i) {
    double of_one = 0.0;
    for (; c < list.first_chunk[i + 1]; ++c) of_one = join<max>(of_one, parts[c]);
    result = join<max>(result, of_one);
    wide |= list.dtype_of(i) == 1;
  }
  free(parts);
  if (!max) {
    // Below 2**-900, up to 2**50 squares that underflowed could show.
    if (wide && !(result >= 0x1p-900 && result < __builtin_inf())) return OUT_OF_RANGE;
    result = __builtin_sqrt(result);
  }
  if (out_dtype == 1) *(double*)out = result;
  else *(float*)out = (float)result;
  return OK;
}

extern "C" int compileclip_norm(void* out, int out_dtype, int64_t n, const uint64_t* pointers,
                                const int64_t* sizes, const int64_t* first_chunk,
                                const int8_t* dtypes, int dtype, int max, int threads) {
  int64_t* counted = nullptr;
  if (!first_chunk) {
    counted = (int64_t*)calloc(n + 1, sizeof(int64_t));
    if (!counted) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < n; ++i) counted[i + 1] = counted[i] + (sizes[i] + CHUNK - 1) / CHUNK;
    first_chunk = counted;
  }
  const List list = {n, pointers, sizes, first_chunk, dtypes, dtype};
  const int status = (max ? norm<true> : norm<false>)(list, out, out_dtype, threads);
  free(counted);
  return status;
}
""".replace("@CHUNK@", str(CHUNK))
