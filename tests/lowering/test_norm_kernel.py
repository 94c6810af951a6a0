"""The native kernel of the total norm on a CPU: against exact norms."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import ORDERS, random, served, truth
from torch import Tensor

import compileclip
from compileclip.lowering import CHUNK
from compileclip.lowering.cpp import cpp_norm

SIZES = [0, 1, 7, 8, 31, 32, 33, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 100_003]


def prepared(tensors: Sequence[Tensor], order: float = 2.0, threads: int = 1) -> Tensor:
    """The norm from addresses, in float64, so that no rounding hides a difference; -1 if none."""
    out = torch.full((), -1.0, dtype=torch.float64)
    sizes, codes = [t.numel() for t in tensors], [cpp_norm.CODES[t.dtype] for t in tensors]
    counts, kinds = array("q", sizes), array("b", codes)
    pointers = array("Q", [t.data_ptr() for t in tensors])
    first = cpp_norm.first_chunks(counts)
    done = cpp_norm.norm_into(out, pointers, counts, first, kinds, order, threads)
    assert done == (out.item() != -1.0)
    if len(set(codes)) == 1:
        again, dtype = torch.full_like(out, -1.0), tensors[0].dtype
        assert cpp_norm.norm_into(again, pointers, counts, None, dtype, order, threads) == done
        assert same(again, out)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", cpp_norm.CODES)
def test_the_norm_is_the_true_one(dtype: torch.dtype, size: int, order: float) -> None:
    tensors = [random(size, dtype), random(50_000, dtype, seed=1)]
    for some in (tensors[:1], tensors):
        expected = truth(some, order)
        if dtype == torch.float64 and expected == 0:
            continue  # it may be that squares vanish
        result = served(some, order)
        wide = dtype == torch.float64
        assert result.dtype == (torch.float64 if wide else torch.float32)
        # observed: 6e-16, 6e-8
        assert result.item() == pytest.approx(expected, rel=1e-15 if wide else 1.2e-7)
    # observed: 6e-16
    assert prepared(tensors, order).item() == pytest.approx(truth(tensors, order), rel=1e-15)


def emulated(tensor: Tensor) -> float:
    """One tensor's sum of squares, operation by operation as the kernel is to take it."""
    total = 0.0
    for chunk in tensor.double().split(CHUNK):
        padded = torch.zeros(-(-len(chunk) // 32) * 32, dtype=torch.float64)
        padded[: len(chunk)] = chunk.square()
        lanes, total_of_chunk = torch.zeros(4, 8, dtype=torch.float64), 0.0
        for row in padded.view(-1, 4, 8):
            lanes += row
        for lane in (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]):
            total_of_chunk += lane.item()
        total += total_of_chunk
    return total


@pytest.mark.parametrize("dtype", cpp_norm.CODES)
def test_the_order_of_the_sums_is_fixed(dtype: torch.dtype) -> None:
    tensors = [random(n, dtype, seed=n) for n in (50_001, 5, 40_000)]
    first, second, third = (emulated(t) for t in tensors)
    assert prepared(tensors).item() == math.sqrt(first + second + third)  # sum() compensates


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", cpp_norm.CODES)
def test_threads_and_grouping_leave_the_bits(dtype: torch.dtype, order: float) -> None:
    sizes = (0, 3, 70_001, 0, 0, 1, CHUNK, 2 * CHUNK, 5, 0)
    tensors = [random(n, dtype, seed=n) for n in sizes]
    usual = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(served(tensors, order))
    finally:
        torch.set_num_threads(usual)
    assert all(same(each, found[0]) for each in found)
    for threads in (2, 3, 100):
        assert same(prepared(tensors, order, threads), prepared(tensors, order))
    # Neighbours that add nothing move a tensor's chunks to other threads, and change no bit.
    alone = prepared([tensors[2]], order)
    for zeros, threads in itertools.product((1, 40_000, 300_000), (1, 2, 3)):
        assert same(prepared([torch.zeros(zeros), tensors[2]], order, threads), alone)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", cpp_norm.CODES)
def test_nan_and_inf_propagate(dtype: torch.dtype, order: float) -> None:
    values, places, sizes = (math.nan, math.inf, -math.inf), (0, 8, 31, 40, 999, -1), (1000, 70_000)
    for value, place, size in itertools.product(values, places, sizes):
        bad = random(size, dtype)
        bad[place] = value
        for tensors in ([bad], [random(50, dtype), bad, random(50, dtype)]):
            total = compileclip.get_total_norm(tensors, order)
            assert same(total, torch.full_like(total, abs(value)))
            if order == math.inf or dtype != torch.float64:
                assert same(served(tensors, order), total)
    both = torch.tensor([math.nan] + [math.inf] * 40 + [1.0], dtype=dtype)
    assert compileclip.get_total_norm([both], order).isnan()


def test_nothing_overflows_or_vanishes() -> None:
    for dtype, values in {
        torch.float32: (1e30, 1e-30, 1e-44),
        torch.bfloat16: (1e30, 1e-30, 1e-40),
        torch.float16: (65504.0, 2.0**-24, 1023 * 2.0**-24, 2.0**-14),
    }.items():
        for value in values:
            tensor = torch.full((100,), value, dtype=dtype)
            exact = 10 * tensor[0].double().item()
            # A subnormal result has fewer digits: half a step of float32 there. Observed: 6e-8.
            assert served([tensor]).item() == pytest.approx(exact, rel=1.2e-7, abs=0.7e-45)
            assert served([tensor], math.inf).item() == tensor[0].item()


def test_subnormal_float16_survives_where_the_cpu_flushes() -> None:
    for value in range(1, 1024, 9):
        tensor = torch.full((9,), value * 2.0**-24, dtype=torch.float16)
        assert torch.set_flush_denormal(True)
        try:
            result = prepared([tensor], math.inf)
        finally:
            torch.set_flush_denormal(False)
        assert result.item() == value * 2.0**-24


def test_float64_beyond_the_range_is_left_to_who_scales() -> None:
    for value in (1e200, 1e-200, 0.0, math.inf, math.nan):
        tensor = torch.full((100,), value, dtype=torch.float64)
        assert prepared([tensor]).item() == -1.0
        result = compileclip.get_total_norm([tensor])
        assert result.item() == pytest.approx(10 * value, rel=1e-15, nan_ok=True)
    for value in (1e150, 1e-130):
        result = prepared([torch.full((100,), value, dtype=torch.float64)])
        assert result.item() == pytest.approx(10 * value, rel=1e-15)  # observed: 2e-16


@st.composite
def lists(draw: Any) -> list[Tensor]:
    """Tensors of mixed dtypes, shapes and layouts, of very different sizes."""
    tensors = []
    for _ in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 9), max_size=4))
        if draw(st.integers(0, 9)) == 0:
            shape = [draw(st.integers(1, 3 * CHUNK))]
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        tensor = random(math.prod(shape), dtype, draw(st.integers(0, 99)))
        tensor *= draw(st.sampled_from([1.0, 1e-3, 1e3]))
        tensors.append(tensor.view(shape).permute(draw(st.permutations(range(len(shape))))))
    return tensors


@settings(max_examples=200)
@given(lists(), st.sampled_from(ORDERS), st.integers(1, 4))
def test_any_list(tensors: list[Tensor], order: float, threads: int) -> None:
    expected = truth(tensors, order)
    assert abs(served(tensors, order).item() - expected) <= 1.2e-7 * expected  # observed: 6e-8
    wide = prepared(tensors, order, threads).item()
    assert abs(wide - expected) <= 1e-15 * expected  # observed: 6e-16
