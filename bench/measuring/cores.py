"""How far apart the cores of two threads lie.

A virtual machine is not told on which cores it runs, and may be moved while it does. Two cores that
share a last-level cache answer each other in tens of nanoseconds, and share the way from there to
memory; two that do not take several times as long, and have a cache and a way each. How long a step
takes depends on that, and of some the more so: it is noted with each round, and rounds of one kind
are summed up together.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from compileclip.native import native_build

# Within a cache 20 ns, between two 175 to 190 ns (AMD EPYC of family 26, virtual, 2 cores).
APART = 100.0  # nanoseconds
# The shortest of several: what else runs makes the others longer.
SOURCE = r"""
#include <omp.h>

#include <atomic>
#include <chrono>

constexpr int TRIES = 4, EXCHANGES = 250, SPINS = 10'000'000;  // some 10 ms
alignas(128) static std::atomic<int> turn;

// Nanoseconds from one thread's store to the other's load; 0 if there is but one thread. Threads
// that are put on one core give up: what they took until then is long enough.
extern "C" double core_latency() {
  using Clock = std::chrono::steady_clock;
  double shortest = 0.0;
  std::atomic<bool> over{false};
  turn = 0;
  const auto each = [](Clock::time_point start) {
    const std::chrono::duration<double, std::nano> taken = Clock::now() - start;
    return taken.count() / (2 * EXCHANGES);
  };
  const auto begin = Clock::now();
#pragma omp parallel num_threads(2)
  if (omp_get_num_threads() == 2) {
    const int own = omp_get_thread_num();
#pragma omp barrier
    for (int i = 0; i < TRIES && !over; ++i) {
      const auto start = Clock::now();
      for (int k = 0; k < EXCHANGES && !over; ++k) {
        for (int spins = 0; turn.load(std::memory_order_acquire) != own && !over; ++spins)
          if (spins == SPINS) over = true;
        turn.store(1 - own, std::memory_order_release);
      }
      const double found = each(start);
      if (own == 0 && (i == 0 || found < shortest)) shortest = found;
    }
  }
  return over ? each(begin) : shortest;
}
"""


def core_latency(device: torch.device) -> float:
    """Nanoseconds in which two of the threads that compute on ``device`` see each other's stores.

    Returns:
        0 where that is not known, or nothing depends on it: on a GPU, with one thread, without a
        C++ compiler.
    """
    if device.type != "cpu" or torch.get_num_threads() < 2:
        return 0.0
    probe = _probe()
    return 0.0 if probe is None else probe()


# A compiler that fails, or hangs, is not to be asked again each round.
@functools.cache
def _probe() -> Callable[[], float] | None:
    try:
        probe = native_build.load(SOURCE).core_latency
    except native_build.CompilerError:
        return None
    probe.restype = ctypes.c_double
    return probe
