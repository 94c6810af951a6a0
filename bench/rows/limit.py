"""The limit: a kernel that moves the bytes of a step and computes nothing.

It reads the gradients, as the norm must; then it reads gradients, parameters and state, and writes
parameters and state. These are two buffers of its own, of as many bytes as the case's. The values
stay as they are: each word is combined by exclusive or with a zero that the compiler does not know.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.rows.runs import Run
from compileclip.native import native_build

GRAIN = 2**17  # bytes of gradients, as in ATen: for fewer a thread is not worth its start
SOURCE = r"""
#include <stdint.h>

// Words of a piece, and pieces that are updated in the order of memory.
constexpr int64_t PIECE = 512, RUN = 2048;

// Both buffers are whole pieces. Each thread takes its share of them twice, the second time in
// runs, of which the last comes first: what was read last is still in its cache.
extern "C" uint32_t move(const uint32_t* source, int64_t sources, uint32_t* target,
                         int64_t targets, uint32_t zero, int threads) {
  uint32_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(^ : sum)
  for (int k = 0; k < threads; ++k) {
    const int64_t from = k * sources / threads, to = (k + 1) * sources / threads;
    for (int64_t piece = from; piece < to; ++piece) {
      const uint32_t* const data = source + piece * PIECE;
#pragma omp simd reduction(^ : sum)
      for (int64_t i = 0; i < PIECE; ++i) sum ^= data[i];
    }
    for (int64_t start, end = to; end > from; end = start) {
      start = from > end - RUN ? from : end - RUN;
      for (int64_t piece = start; piece < end; ++piece) {
        const uint32_t* const data = source + piece * PIECE;
        const int64_t last = (piece + 1) * targets / sources;
        for (int64_t own = piece * targets / sources; own < last; ++own) {
          uint32_t* const updated = target + own * PIECE;
#pragma omp simd
          for (int64_t i = 0; i < PIECE; ++i) updated[i] ^= data[i] & zero;
        }
      }
    }
  }
  return sum;
}
"""
WORD, PIECE = 4, 512  # bytes, and words, as in ``SOURCE``


class MoveOnCpu:
    """Moves bytes on a CPU."""

    scale = 1.0

    def __init__(self, source_bytes: int, target_bytes: int) -> None:
        try:
            self._move: Any = native_build.load(SOURCE).move
        except native_build.CompilerError as error:
            raise NotRunError(str(error)) from error
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        self._move.argtypes = pointer, count, pointer, count, ctypes.c_uint32, ctypes.c_int
        self.source, self.target = (_random(size) for size in (source_bytes, target_bytes))
        self._threads = min(torch.get_num_threads(), -(-source_bytes // GRAIN))

    def __call__(self) -> None:
        """Read the source; then read it again, and update the target."""
        arguments = [x for t in (self.source, self.target) for x in (t.data_ptr(), len(t) // PIECE)]
        self._move(*arguments, 0, self._threads)


def _random(size: int) -> Tensor:
    pieces = -(-size // (PIECE * WORD))
    return torch.randint(-(2**31), 2**31, (pieces * PIECE,), dtype=torch.int32)


class Limit(Run):
    """The limit on the device of the case."""

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        device = work.params[0].device
        grads = sum(p.nbytes for p in work.params)
        updated = (work.needed_bytes - 2 * grads) // 2
        if device.type == "cuda":
            from bench.rows.limit_triton import Move

            self._move: Any = Move(device, grads, updated)
        elif device.type == "cpu":
            self._move = MoveOnCpu(grads, updated)
        else:
            raise NotRunError(f"there is no kernel that only moves bytes for {device.type}")
        self.scale = self._move.scale

    def step(self) -> None:
        """Move the bytes."""
        self._move()

    def difference(self) -> None:
        """It computes nothing."""
        return
