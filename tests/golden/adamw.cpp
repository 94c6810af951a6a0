
#include <algorithm>
#include <omp.h>

// PRELUDE


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
