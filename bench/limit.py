"""The limit: a kernel that moves the bytes of a step and computes nothing.

It reads the gradients, as the norm must; then it reads gradients, parameters and state, and writes
parameters and state. The values stay as they are: each word is combined by exclusive or with a zero
that the compiler does not know.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.case import NotRunError
from bench.runs import Run
from bench.workload import Workload
from compileclip.lowering import native

CHUNK = 4096  # elements; a thread goes through all arrays of a chunk while it is in its cache
GRAIN = 32768
SOURCE = r"""
#include <stdint.h>
#include <string.h>

constexpr int64_t CHUNK = @CHUNK@;

static uint64_t read(const char* data, int64_t bytes) {
  uint64_t sum = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, data + i, 8);
    sum ^= word;
  }
  for (; i < bytes; ++i) sum ^= (uint8_t)data[i];
  return sum;
}

static void update(char* data, int64_t bytes, uint64_t zero) {
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, data + i, 8);
    word ^= zero;
    memcpy(data + i, &word, 8);
  }
  for (; i < bytes; ++i) data[i] ^= (char)zero;
}

// The arrays of tensor t: its gradient at grads[t], what is updated at updated[a * tensors + t];
// the bytes of an element in widths[0] and widths[1 + a]. Thread k of n takes its share of all
// chunks twice, the second time backwards: the last read are still in its cache.
extern "C" uint64_t move(int64_t tensors, const int64_t* sizes, const int64_t* first_chunk,
                         char* const* grads, char* const* updated, int64_t arrays,
                         const int64_t* widths, uint64_t zero, int threads) {
  const int64_t total = first_chunk[tensors];
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : sum)
  for (int k = 0; k < threads; ++k) {
    const int64_t from = k * total / threads, to = (k + 1) * total / threads;
    int64_t t = 0;
    for (int64_t c = from; c < to; ++c) {
      while (first_chunk[t + 1] <= c) ++t;
      const int64_t at = (c - first_chunk[t]) * CHUNK, left = sizes[t] - at;
      const int64_t n = left < CHUNK ? left : CHUNK;
      sum ^= read(grads[t] + at * widths[0], n * widths[0]);
    }
    for (int64_t c = to - 1; c >= from; --c) {
      while (first_chunk[t] > c) --t;
      const int64_t at = (c - first_chunk[t]) * CHUNK, left = sizes[t] - at;
      const int64_t n = left < CHUNK ? left : CHUNK;
      sum ^= read(grads[t] + at * widths[0], n * widths[0]);
      for (int64_t a = 0; a < arrays; ++a) {
        const int64_t width = widths[1 + a];
        update(updated[a * tensors + t] + at * width, n * width, zero);
      }
    }
  }
  return sum;
}
"""


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
        try:
            self._move = native.load(SOURCE.replace("@CHUNK@", str(CHUNK))).move
        except native.CompilerError as error:
            raise NotRunError(str(error)) from error
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        tables = (integer, pointer, pointer, pointer, pointer)
        self._move.argtypes = (*tables, integer, pointer, ctypes.c_uint64, ctypes.c_int)
        self._move.restype = ctypes.c_uint64
        names = list(work.state[0])
        arrays = [work.params, *[[state[name] for state in work.state] for name in names]]
        self._sizes = array("q", [p.numel() for p in work.params])
        self._first_chunk = array("q", [0])
        for size in self._sizes:
            self._first_chunk.append(self._first_chunk[-1] + -(-size // CHUNK))
        self._updated = _addresses([t for tensors in arrays for t in tensors])
        widths = [work.params[0], *[tensors[0] for tensors in arrays]]
        self._widths = array("q", [t.element_size() for t in widths])
        self._arrays = len(arrays)
        # As ATen does: for fewer elements a thread is not worth its start.
        most = -(-sum(self._sizes) // GRAIN)
        self._threads = max(1, min(torch.get_num_threads(), most))
        self._grads: Sequence[Tensor] = ()
        self._pointers = array("Q")

    def prepare(self, grads: Sequence[Tensor]) -> None:
        self._grads, self._pointers = grads, _addresses(grads)

    def step(self) -> None:
        tables = (self._sizes, self._first_chunk, self._pointers, self._updated)
        self._move(
            len(self._sizes),
            *[table.buffer_info()[0] for table in tables],
            self._arrays,
            self._widths.buffer_info()[0],
            0,
            self._threads,
        )


class _Gpu:
    """Over two buffers of its own, of as many bytes as the case's."""

    def __init__(self, work: Workload) -> None:
        from bench.limit_triton import Move

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
