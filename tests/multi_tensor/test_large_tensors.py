"""Tensors of more than 2**31 elements: offsets, in elements and in bytes, have 64 bits."""

from __future__ import annotations

import math
import mmap
import re
from array import array

import pytest
import torch
from lowering_programs import aten, program
from torch import Tensor

import compileclip
from compileclip.lowering import CHUNK
from compileclip.lowering.cpp import cpp_kernel, cpp_norm, cpp_norm_source

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which mmap does not name
# What the code may have as an int: it counts neither elements nor chunks nor tensors.
NARROW = {"threads", "thread", "dtype", "out_dtype", "dtype_of", "max", "norm", "compileclip_norm"}
NARROW |= {"status", "k", "j"}
FIRST = 2**33  # the first element that is there; a multiple of CHUNK


def far(values: Tensor) -> int:
    """The address of a tensor that has ``values`` from FIRST on; nothing before is there."""
    return values.data_ptr() - FIRST * values.element_size()


def only_the_end() -> tuple[array[int], array[int]]:
    """The size of such a tensor, and numbers of chunks that leave out those that are not there."""
    return array("q", [FIRST + CHUNK + 5]), array("q", [-(FIRST // CHUNK), 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_update_reaches_them(dtype: torch.dtype) -> None:
    made = program(lambda a, b: {"a": aten.add.Tensor(a, b)}, {"a": dtype, "b": dtype})
    a, b = torch.randn(CHUNK + 5).to(dtype), torch.randn(CHUNK + 5).to(dtype)
    expected = a + b
    sizes, first_chunk = only_the_end()
    cpp_kernel.Kernel(made)(array("Q", [far(a), far(b)]), sizes, first_chunk, [], [], 1)
    assert torch.equal(a, expected)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_the_norm_reaches_them(order: float) -> None:
    values, out = torch.randn(CHUNK + 5), torch.zeros((), dtype=torch.float64)
    sizes, first_chunk = only_the_end()
    done = cpp_norm.norm_into(
        out, array("Q", [far(values)]), sizes, first_chunk, torch.float32, order, 1
    )
    assert done
    # Sums in another order; observed: 1.1e-15.
    expected = values.double().norm(order)
    torch.testing.assert_close(out, expected, rtol=3e-15, atol=0)


def test_generated_code_counts_in_64_bits() -> None:
    made = program(lambda a: {"a": aten.neg.default(a)}, {"a": torch.float32})
    for text in (cpp_kernel.source(made), cpp_norm_source.SOURCE):
        loops = re.findall(r"for \((\w+) \w+ = ", text)
        assert loops
        assert {"int64_t"} <= set(loops) <= {"int64_t", "int"}
        for name in re.findall(r"\bint (\w+)", text):
            assert name in NARROW, name


@pytest.mark.sweep
def test_a_norm_of_more_than_2_to_the_31_elements() -> None:
    """Of zeros that take no memory, but for the pages of two elements."""
    count = 2**31 + 2**20 + 3
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, 2 * count, flags=private)
    tensor = torch.frombuffer(memory, dtype=torch.float16)
    tensor[2**31 + 5], tensor[-1] = 3, -4
    assert compileclip.get_total_norm([tensor]) == 5
    assert compileclip.get_total_norm([tensor], math.inf) == 4
    assert cpp_norm.total_norm([tensor, tensor[2**31 :]], 2.0) == math.sqrt(50)
