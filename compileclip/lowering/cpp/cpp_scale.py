"""Multiply a list of tensors in place as one native kernel: float32 and float64, on a CPU.

Tensors and scale have one dtype, so that a product is rounded once, as by torch's ``mul_``. Of two
dtypes that computes in the wider one for a tensor of 0 dimensions, and in the tensor's for another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compileclip.lowering import CHUNK, plain_tensors, threads

_dtype = attrgetter("dtype")
SERVED = {torch.float32, torch.float64}
SOURCE = r"""
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

constexpr int64_t CHUNK = @CHUNK@;
constexpr int64_t GRAIN = 32768;  // ATen's: for fewer elements a thread is not worth its start
constexpr int64_t AHEAD = 4096;  // bytes: a core does not fetch across the end of a tensor

// At any address.
typedef float Float32 __attribute__((aligned(1)));
typedef double Float64 __attribute__((aligned(1)));

struct List {
  int64_t n;
  const uint64_t* pointers;
  const int64_t* sizes;
  int64_t width;  // bytes of an element
  double factor;

  int64_t chunks(int64_t i) const { return (sizes[i] + CHUNK - 1) / CHUNK; }

  void prefetch(int64_t i) const {
    const int64_t bytes = i < n ? sizes[i] * width : 0;
    for (int64_t k = 0; k < bytes && k < AHEAD; k += 64)
      __builtin_prefetch((char*)pointers[i] + k, 1);
  }

  template <class T> void scale(int64_t i, int64_t begin, int64_t end) const {
    T* const data = (T*)pointers[i];
    const T by = (T)factor;
    for (int64_t k = begin; k < end; ++k) data[k] *= by;
  }

  // Chunks are numbered through the list.
  void walk(int64_t begin, int64_t end) const {
    for (int64_t i = 0, first = 0; i < n && first < end; first += chunks(i++)) {
      const int64_t from = begin > first ? (begin - first) * CHUNK : 0;
      const int64_t most = (end - first) * CHUNK, to = most < sizes[i] ? most : sizes[i];
      if (from >= to) continue;
      prefetch(i + 1);
      width == 4 ? scale<Float32>(i, from, to) : scale<Float64>(i, from, to);
    }
  }
};

struct Span {
  uint64_t begin, end;
};

static int compare(const void* a, const void* b) {
  const uint64_t x = ((const Span*)a)->begin, y = ((const Span*)b)->begin;
  return x < y ? -1 : x > y;
}

// Whether no two tensors share memory, so that it does not matter which is scaled first.
static bool are_apart(const List& list) {
  Span* const spans = (Span*)malloc((list.n + 1) * sizeof(Span));
  if (!spans) return false;
  int64_t count = 0;
  for (int64_t i = 0; i < list.n; ++i)
    if (list.sizes[i])
      spans[count++] = {list.pointers[i], list.pointers[i] + list.sizes[i] * list.width};
  const auto in_order = [&] {
    for (int64_t i = 1; i < count; ++i)
      if (spans[i].begin < spans[i - 1].end) return false;
    return true;
  };
  bool apart = in_order();
  if (!apart) {
    qsort(spans, count, sizeof(Span), compare);
    apart = in_order();
  }
  free(spans);
  return apart;
}

extern "C" void compileclip_scale(int64_t n, const uint64_t* pointers, const int64_t* sizes,
                                  int width, double factor, int threads) {
  const List list = {n, pointers, sizes, width, factor};
  int64_t chunks = 0, elements = 0;
  for (int64_t i = 0; i < n; ++i) chunks += list.chunks(i), elements += sizes[i];
  if (threads <= 1 || elements < GRAIN || !are_apart(list)) {
    list.walk(0, chunks);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    list.walk(chunks * thread / count, chunks * (thread + 1) / count);
  }
}
""".replace("@CHUNK@", str(CHUNK))


def scale_(tensors: Sequence[Tensor], scale: Tensor) -> bool:
    """Multiply ``tensors`` in place by ``scale``, where the kernel serves them.

    It serves plain tensors on a CPU, float32 or float64 as ``scale``, without gaps or overlaps
    within one. Two that share memory are multiplied one after the other, as torch does.

    Args:
        tensors: at least one tensor of any kind.
        scale: a 0-dim real tensor.

    Returns:
        Whether that was done; False where they are not served, or there is no compiler.
    """
    if scale.dtype not in SERVED or {scale.dtype} != set(map(_dtype, tensors)):
        return False
    if not plain_tensors.serves([*tensors, scale]):
        return False
    try:
        # Written as the memory has it, so each element must be there once.
        contiguous = all(map(Tensor.is_contiguous, tensors))
        if not contiguous and not all(map(plain_tensors.is_dense, tensors)):
            return False
        found, factor = plain_tensors.addresses(tensors), scale.item()
    except RuntimeError:  # a sparse tensor, a wrapper of functorch's: there is no memory to write
        return False
    kernel = available() if found else None
    if found is None or kernel is None:
        return False
    pointers, sizes = found
    where = pointers.buffer_info()[0], sizes.buffer_info()[0]
    kernel(len(pointers), *where, scale.itemsize, factor, threads())
    increment_version(tensors)
    return True


@functools.cache
def available() -> Callable[..., None] | None:
    """The kernel, compiled at the first call; ``None`` if that fails. It is tried once."""
    import ctypes

    from compileclip.native import native_build

    code, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    of_type = ctypes.CFUNCTYPE(None, size, pointer, pointer, code, ctypes.c_double, code)
    try:
        return of_type(("compileclip_scale", native_build.load(SOURCE)))
    except (native_build.CompilerError, OSError):
        return None
