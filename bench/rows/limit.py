"""The limit: a kernel that moves the bytes of a step and computes nothing.

It reads the gradients, as the norm must; then it reads gradients, parameters and state, and writes
parameters and state. The values stay as they are: each word is combined by exclusive or with a zero
that the compiler does not know.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.rows.runs import Run
from compileclip.native import native_build

CHUNK = 16384  # elements; each thread takes whole ones
RUN = 64  # chunks that are updated in the order of memory
GRAIN = 32768  # as in ATen: for fewer elements a thread is not worth its start
SOURCE = r"""
#include <stdint.h>

constexpr int64_t CHUNK = @CHUNK@, RUN = @RUN@;
typedef @GRADIENT@ Gradient;

// Fetched ahead, across the end of a tensor too, as a core does not do so far of itself.
template <int64_t BLOCK, class Word>
static void fetch(const Word* data, int64_t at, int64_t left, const Word* next) {
  const char* const block = (const char*)(at < left ? data + at : next + (at - left));
  for (int64_t k = 0; k < BLOCK * int64_t(sizeof(Word)); k += 64) __builtin_prefetch(block + k);
}

static uint32_t read(const Gradient* grad, int64_t n, int64_t left, int64_t size,
                     const Gradient* next) {
  constexpr int64_t BLOCK = 512 / sizeof(Gradient), AHEAD = 4096 / sizeof(Gradient);
  const int64_t ahead = size < AHEAD ? size : AHEAD;
  uint32_t sum = 0;
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    fetch<BLOCK>(grad, i + ahead, left, next);
#pragma omp simd reduction(^ : sum)
    for (int64_t k = 0; k < BLOCK; ++k) sum ^= grad[i + k];
  }
  for (; i < n; ++i) sum ^= grad[i];
  return sum;
}

static void update(const Gradient* __restrict grad, int64_t n, int64_t left, int64_t size,
                   uint32_t zero, const Gradient* next, @PARAMETERS@) {
  constexpr int64_t BLOCK = 32, AHEAD = 512;
  const int64_t ahead = size < AHEAD ? size : AHEAD;
  for (int64_t from = 0; from < n; from += BLOCK) {
    const int64_t to = from + BLOCK < n ? from + BLOCK : n, at = from + ahead;
    fetch<BLOCK>(grad, at, left, next);
    @FETCHES@
#pragma omp simd
    for (int64_t i = from; i < to; ++i) {
      @UPDATES@
    }
  }
}

// The gradient of tensor t is at grads[t], array a of what is updated at updated[a * tensors + t].
// Thread k of n takes its share of all chunks twice, the second time in runs, of which the last
// comes first: what was read last is still in its cache.
extern "C" uint32_t move(int64_t tensors, const int64_t* sizes, const int64_t* first_chunk,
                         void* const* grads, void* const* updated, uint32_t zero, int threads) {
  const int64_t total = first_chunk[tensors];
  uint32_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : sum)
  for (int k = 0; k < threads; ++k) {
    const int64_t from = k * total / threads, to = (k + 1) * total / threads;
    const auto walk = [&](int64_t c, int64_t end, auto each) {
      int64_t t = 0;
      while (first_chunk[t + 1] <= c) ++t;
      for (; c < end; ++t) {
        const int64_t last = first_chunk[t + 1] < end ? first_chunk[t + 1] : end;
        const int64_t at = (c - first_chunk[t]) * CHUNK, most = (last - c) * CHUNK;
        const int64_t left = sizes[t] - at;
        each(t, t + 1 < tensors ? t + 1 : t, at, left < most ? left : most, left);
        c = last;
      }
    };
    walk(from, to, [&](int64_t t, int64_t next, int64_t at, int64_t n, int64_t left) {
      sum ^= read((const Gradient*)grads[t] + at, n, left, sizes[t], (const Gradient*)grads[next]);
    });
    for (int64_t start, end = to; end > from; end = start) {
      start = from > end - RUN ? from : end - RUN;
      walk(start, end, [&](int64_t t, int64_t next, int64_t at, int64_t n, int64_t left) {
        update((const Gradient*)grads[t] + at, n, left, sizes[t], zero,
               (const Gradient*)grads[next], @ARGUMENTS@);
      });
    }
  }
  return sum;
}
"""
WORDS = {2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}


def source(gradient: torch.dtype, updated: Sequence[torch.dtype]) -> str:
    """The kernel for gradients and arrays of these dtypes."""
    words = [WORDS[dtype.itemsize] for dtype in updated]
    named = list(enumerate(words))
    parts = {
        "CHUNK": str(CHUNK),
        "RUN": str(RUN),
        "GRADIENT": WORDS[gradient.itemsize],
        "PARAMETERS": ", ".join(f"{w}* __restrict a{a}, const {w}* n{a}" for a, w in named),
        "FETCHES": " ".join(f"fetch<BLOCK, {w}>(a{a}, at, left, n{a});" for a, w in named),
        "UPDATES": " ".join(f"a{a}[i] ^= ({word})(grad[i] & zero);" for a, word in named),
        "ARGUMENTS": ", ".join(
            f"({word}*)updated[{a} * tensors + t] + at, ({word}*)updated[{a} * tensors + next]"
            for a, word in named
        ),
    }
    return re.sub("@([A-Z]+)@", lambda found: parts[found.group(1)], SOURCE)


class Limit(Run):
    """The limit on the device of the case."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        device = work.params[0].device.type
        if device == "cpu":
            self._kernel: _Cpu | _Gpu = _Cpu(work)
        elif device == "cuda":
            self._kernel = _Gpu(work)
            self.scale = self._kernel.scale
        else:
            raise NotRunError(f"there is no kernel that only moves bytes for {device}")

    def prepare(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step; finding their addresses moves no bytes of a step."""
        self._kernel.prepare(grads)

    def step(self) -> None:
        """Move the bytes."""
        self._kernel.step()

    def release(self) -> None:
        """Let the gradients go."""
        self._kernel.prepare([])

    def difference(self) -> None:
        """It computes nothing."""
        return


class _Cpu:
    def __init__(self, work: Workload) -> None:
        names = list(work.state[0])
        arrays = [work.params, *[[state[name] for state in work.state] for name in names]]
        code = source(work.case.dtype, [tensors[0].dtype for tensors in arrays])
        try:
            self._move = native_build.load(code).move
        except native_build.CompilerError as error:
            raise NotRunError(str(error)) from error
        pointer = ctypes.c_void_p
        self._move.argtypes = (ctypes.c_int64, *[pointer] * 4, ctypes.c_uint32, ctypes.c_int)
        self._move.restype = ctypes.c_uint32
        self._sizes = array("q", [p.numel() for p in work.params])
        chunks = [-(-size // CHUNK) for size in self._sizes]
        self._first_chunk = array("q", itertools.accumulate(chunks, initial=0))
        self._updated = _addresses([t for tensors in arrays for t in tensors])
        most = -(-sum(self._sizes) // GRAIN)
        self._threads = max(1, min(torch.get_num_threads(), most))
        self._grads: Sequence[Tensor] = ()
        self._pointers = array("Q")

    def prepare(self, grads: Sequence[Tensor]) -> None:
        self._grads, self._pointers = grads, _addresses(grads)

    def step(self) -> None:
        tables = (self._sizes, self._first_chunk, self._pointers, self._updated)
        addresses = [table.buffer_info()[0] for table in tables]
        self._move(len(self._sizes), *addresses, 0, self._threads)


class _Gpu:
    """Over two buffers of its own, of as many bytes as the case's."""

    def __init__(self, work: Workload) -> None:
        from bench.rows.limit_triton import Move

        self._move = Move(work.params[0].device, *_flat_bytes(work))
        self.scale = self._move.scale

    def prepare(self, grads: Sequence[Tensor]) -> None:
        pass

    def step(self) -> None:
        self._move()


def _flat_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of the gradients, and of what is updated."""
    grads = sum(p.nbytes for p in work.params)
    return grads, (work.needed_bytes - 2 * grads) // 2


def _addresses(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", [t.data_ptr() for t in tensors])
