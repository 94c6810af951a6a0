"""The kernel that only moves bytes, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from functools import reduce
from operator import xor

import torch
from triton_runs import device, passed_in_the_interpreter

from bench.rows import limit_triton
from bench.rows.limit_triton import BLOCK, WORD, Move

__all__ = ["device"]


def test_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__) == 2


def test_it_reads_all_and_changes_nothing(device: str) -> None:
    move = Move(torch.device(device), 2 * BLOCK * WORD - 3, 3 * BLOCK * WORD + 1)
    assert [len(buffer) // BLOCK for buffer in (move.source, move.target)] == [2, 4]
    assert move.scale == 1.0
    generator = torch.Generator().manual_seed(0)
    for buffer in (move.source, move.target):
        buffer.copy_(torch.randint(-(2**31), 2**31, buffer.shape, generator=generator))
    before = move.target.clone()
    move()
    assert torch.equal(move.target, before)
    for block, found in zip(move.source.view(2, BLOCK).tolist(), move._out.tolist(), strict=True):
        assert found == reduce(xor, block)


def test_what_is_left_out_is_scaled(device: str) -> None:
    most = limit_triton.MOST
    limit_triton.MOST = 4 * BLOCK * WORD
    try:
        move = Move(torch.device(device), 4 * BLOCK * WORD, 12 * BLOCK * WORD)
    finally:
        limit_triton.MOST = most
    assert move.scale == 4.0
    assert [len(buffer) // BLOCK for buffer in (move.source, move.target)] == [1, 3]
