"""The C++ around a program's operations: which thread takes what, in which order, fetched when.

How fast the update of many elements is depends on memory. Four things matter, measured for AdamW
on two cores of an AMD EPYC (family 26) with a last-level cache each:

* A thread goes through memory forward. What a core fetches ahead of itself is in vain each time it
  is to go on elsewhere: with each chunk of 64 KiB before the one read last, 64 tensors of
  1024 x 1024 took 1.15 times as long.
* It fetches ahead across the end of a tensor, which a core does not do of itself: 2,000 tensors of
  32 x 32 took 1.4 times as long without, 64 of 1024 x 1024 1.04 times.
* It fetches little at a time. With blocks of 64 elements 64 tensors of 1024 x 1024 took 1.03 times
  as long, and 1.05 times where g++ knew that a block is whole, and unrolled it.
* What the norm read last is taken first, as it is still in the cache. So it goes forward in runs of
  chunks, and the last run comes first.
"""

from __future__ import annotations

from compileclip.lowering import CHUNK

RUN = 64  # chunks; up to 4 MiB of float32, or so many small tensors
BLOCK = 32  # elements that are fetched together
AHEAD = 512  # elements that they are ahead; of 256 and 1024 none was faster
GRAIN = 32768  # fewer elements than this stay on one thread, as in ATen

NUMBERS = {"CHUNK": CHUNK, "RUN": RUN, "BLOCK": BLOCK, "AHEAD": AHEAD, "GRAIN": GRAIN}

FRAME = r"""
#include <algorithm>
#include <omp.h>

$PRELUDE

constexpr int64_t CHUNK = $CHUNK, RUN = $RUN, BLOCK = $BLOCK, AHEAD = $AHEAD, GRAIN = $GRAIN;

struct Launch {
$MEMBERS
};

static Launch prepare(const double* scalars, const uint64_t* values) {
$PREPARE
  return Launch{$MEMBER_NAMES};
}

template <class S> INLINE void fetch(const S* block) {
  const char* const bytes = reinterpret_cast<const char*>(block);
  for (int64_t k = 0; k < BLOCK * int64_t(sizeof(S)); k += 64) __builtin_prefetch(bytes + k);
}

// The next ``count`` elements of a tensor, of which ``left`` are to come; the one after it begins
// at n0, n1 ...
INLINE void run(const Launch& launch, int64_t count, int64_t left, int64_t ahead, $POINTERS,
                $NEXT) {
$LOCALS
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    const int64_t end = std::min(begin + BLOCK, count), at = begin + ahead;
$FETCH
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
$EACH
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
      run(launch, count, left, ahead, $TENSOR, $NEXT_TENSOR);
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
"""
