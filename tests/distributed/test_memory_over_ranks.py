"""The memory that the norm of large parts takes besides them."""

from __future__ import annotations

import resource
import threading
import time
from typing import Any

import torch
from parameters import mesh
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import compileclip

ELEMENTS, TENSORS = 100_000_000, 20


class Peak(threading.Thread):
    """The most memory that this process has, as Linux counts it, while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.most = threading.Event(), 0

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, resident())
            time.sleep(0.0002)

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.done.set()
        self.join()


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def check_memory() -> int:
    part = ELEMENTS // TENSORS // 2
    params = []
    for _ in range(TENSORS):
        params.append(nn.Parameter(DTensor.from_local(torch.zeros(part), mesh(2), [Shard(0)])))
        params[-1].grad = DTensor.from_local(torch.ones(part), mesh(2), [Shard(0)])
    compileclip.clip_grad_norm_(params, 1e9)
    before = resident()
    with Peak() as peak:
        norm = compileclip.clip_grad_norm_(params, 1e9)
    torch.testing.assert_close(norm.item(), ELEMENTS**0.5, rtol=1e-6, atol=0.0)
    return peak.most - before


def test_memory_of_the_norm(on_ranks: Any) -> None:
    extra = on_ranks(2, check_memory)
    print(f"{max(extra) / 2**20:.2f} MiB for {ELEMENTS:,} elements")
    assert max(extra) < 1 << 20
