"""Kernels for GPUs, compiled without one: 16-byte accesses, no spills, how many kernels there are.

For NVIDIA's sm_80 and sm_90 and for AMD's gfx942. Every input of torch's list is under the marker
``sweep``, each optimizer's first one in the usual run.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lowering_operations import CASES, LIBRARY, SCALARS, Build
from lowering_programs import adamw, program
from optimizer_programs import (
    ADAMW,
    CAPTURABLE,
    EVERY_INPUT,
    FIRST_INPUTS,
    program_on_a_gpu,
    programs,
)
from torch.fx import Proxy
from triton_runs import INTERPRETED
from triton_targets import TARGETS, Code, compile_for, compile_once, compile_program, options_for

from compileclip.lowering.program import Program, dtype_of
from compileclip.lowering.triton import triton_norm, triton_norm_kernels
from compileclip.lowering.triton.triton_kernel import BLOCK, Kernel, Tables
from compileclip.lowering.triton.triton_lists import ARGUMENTS, _writer, block_list, on_device

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ATEN = torch.ops.aten
DIVISIONS = {ATEN.div.Tensor, ATEN.addcdiv.default, ATEN.reciprocal.default}
on_each_target = pytest.mark.parametrize("target", TARGETS)


def bytes_per_thread(target: str, dtype: torch.dtype) -> int:
    """How much of a block of one operand a thread has."""
    warps = int(options_for(target)["num_warps"])
    return BLOCK * dtype.itemsize // (warps * TARGETS[target].warp_size)


def check_update(made: Program, code: Code) -> None:
    """One kernel, which moves operands 16 bytes at a time and keeps all else in registers."""
    assert code.spilled == 0
    assert code.kernels == 1
    assert not re.findall(r"\b(?:atom|red)\.|global_atomic|\.local|scratch_", code.text)
    stored = [n for n in made.operands if n.name in made.stored]
    read = [n for n in made.operands if n.users]  # ASGD's average may be written alone
    for kind, operands in (("load", read), ("store", stored)):
        wide = sum(bytes_per_thread(code.target, dtype_of(n)) // 16 for n in operands)
        assert code.accesses.count((kind, 128)) == wide
    assert {bits for _, bits in code.widest.accesses} == {128}
    assert not re.findall(r"\.shared|\bds_(?:read|write)", code.widest.text)


@on_each_target
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_adamw(target: str, dtype: torch.dtype) -> None:
    (made,) = programs(ADAMW, dtype)
    check_update(made, compile_program(target, made))


@pytest.mark.parametrize("case", FIRST_INPUTS)
def test_each_optimizer(case: int) -> None:
    for made in programs(case, F32):
        check_update(made, compile_program("sm_90", made))


@on_each_target
def test_step_counts_on_the_device(target: str) -> None:
    made = program_on_a_gpu("AdamW", F32)
    assert made.counted == ("step",)
    assert made.conditional
    check_update(made, compile_program(target, made))
    once = compile_once(target, made)
    assert once.kernels == 1
    assert once.spilled == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_the_update_computes_nothing_that_is_one_for_all(name: str, target: str) -> None:
    """Powers, bias corrections, the clip coefficient: once a step, and their results are loaded."""
    made = program_on_a_gpu(name, F32)
    update, once = compile_program(target, made).text, compile_once(target, made).text
    powers = r"\b(?:ex2|lg2)\.approx|call\.uni|f64"
    assert re.findall(powers, once)
    assert not re.findall(powers, update)
    divisions = [n for n in made.graph.nodes if n.target in DIVISIONS]
    each = [n for n in divisions if n.meta["val"].dim() == 1]  # of each element
    assert len(divisions) > len(each) > 0
    assert len(re.findall(r"\b(?:div|rcp)\.", update)) == 2 * 8 * len(each)
    assert len(re.findall(r"\b(?:div|rcp)\.", once)) >= len(divisions) - len(each)


@on_each_target
def test_a_reciprocal_of_a_scalar_is_taken_once_and_in_float64(target: str) -> None:
    (made,) = programs(ADAMW, F32)  # sqrt(exp_avg_sq) / sqrt(1 - beta2 ** step)
    once, update = compile_once(target, made), compile_program(target, made)
    assert re.findall(r"rcp\.rn\.f64|div\.rn\.f64|v_div_fixup_f64", once.text)
    assert not re.findall(r"f64", update.text.split(".amdgpu_metadata")[0])


@pytest.mark.sweep
@on_each_target
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CAPTURABLE)
def test_each_step_count_on_the_device(name: str, dtype: torch.dtype, target: str) -> None:
    made = program_on_a_gpu(name, dtype)
    check_update(made, compile_program(target, made))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_addresses_out_of_arguments(target: str) -> None:
    place, addresses = torch.zeros(1, dtype=torch.int64), [0] * ARGUMENTS
    code = compile_for(target, _writer(), place, 1, *addresses, num_warps=1)
    assert code.kernels == 1
    assert code.spilled == 0
    assert code.accesses == [("store", 64)] * ARGUMENTS


@pytest.mark.sweep
@on_each_target
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("case", EVERY_INPUT)
def test_each_input(case: int, dtype: torch.dtype, target: str) -> None:
    for made in programs(case, dtype):
        check_update(made, compile_program(target, made))


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("gfx942", F32),
        # sm_90 is in test_lowering_triton.py
        *(pytest.param("sm_80", d, marks=pytest.mark.sweep) for d in (F32, F64, BF16, F16)),
        *(pytest.param("gfx942", d, marks=pytest.mark.sweep) for d in (F64, BF16, F16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("builds", [CASES, LIBRARY], ids=["own", "libdevice"])
def test_every_operation_compiles(
    builds: dict[str, Build], target: str, dtype: torch.dtype
) -> None:
    def stores(x: Proxy, y: Proxy, z: Proxy, s: Proxy, **outs: Proxy) -> dict[str, Proxy]:
        return dict(zip(outs, (build(x, y, z, s) for build in builds.values()), strict=True))

    names = ["x", "y", "z", *(f"out{i}" for i in range(len(builds)))]
    made = program(stores, dict.fromkeys(names, dtype), SCALARS)
    assert compile_program(target, made).kernels == 1


@on_each_target
@pytest.mark.parametrize(
    "order", ["squares", *(pytest.param(x, marks=pytest.mark.sweep) for x in ("max", "values"))]
)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_norm(dtype: torch.dtype, order: str, target: str) -> None:
    """The first kernel's loop loads 16 bytes at a time; neither kernel spills."""
    constants = {"ORDER": order, "SCALED": order == "squares" and dtype == F64}
    shares, numbers = torch.zeros(3, 1, dtype=F64), torch.zeros(1, dtype=torch.int64)
    first = compile_for(
        target,
        triton_norm_kernels.take_shares,
        *(numbers, numbers, block_list([1], 1), shares, 0, 1),
        DTYPE=triton_norm.TYPES[dtype],
        WIDE=triton_norm._wide(dtype, math.inf if order == "max" else 1.0),
        CHUNK=triton_norm.CHUNK,
        **constants,
        **triton_norm._FIRST,
    )
    second = compile_for(
        target,
        triton_norm_kernels.add_shares,
        *(shares, torch.zeros(()), 1),
        **constants,
        **triton_norm.SECOND,
    )
    for code in (first, second):
        assert code.kernels == 1
        assert code.spilled == 0
        assert not re.findall(r"\b(?:atom|red)\.|global_atomic|\.local|scratch_", code.text)
    assert set(first.widest.accesses) == {("load", 128)}
    threads = triton_norm._FIRST["num_warps"] * TARGETS[target].warp_size
    step = triton_norm_kernels.STEP.value * dtype.itemsize
    wide, each = first.accesses.count(("load", 128)), step // threads // 16
    if target.startswith("gfx"):  # triton 3.8 unrolls the loop there
        assert wide >= each
        assert wide % each == 0
    else:
        assert wide == each


class Counter:
    """Takes the place of a kernel and counts launches."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*_: Any, **__: Any) -> None:
            self.launches += 1

        return launch


@pytest.mark.parametrize("count", [1, 1000])
def test_how_many_kernels_a_step_has(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for the norm and one for the update, however many tensors there are."""
    made = adamw()
    rows = [[torch.zeros(3) for _ in range(count)] for _ in made.operands]
    table = torch.tensor([[t.data_ptr() for t in row] for row in rows])
    kernel, norm, update = Kernel(made), Counter(), Counter()
    for name in ("take_shares", "add_shares"):
        monkeypatch.setattr(triton_norm, name, norm)
    once = Counter()
    kernel._once, kernel._step = once, update
    sizes, chunks = triton_norm.chunks((3,) * count, torch.device("cpu"))
    lists = [triton_norm.List(on_device(table[1].tolist(), table.device), sizes, chunks, F32)]
    blocks = block_list(sizes.tolist(), BLOCK)
    tables = Tables(table, sizes, blocks, torch.zeros(kernel.slots, dtype=torch.int64))
    shares = triton_norm.Shares(lists, 2.0)
    kernel(tables, [1.0] * len(made.scalars), {}, {}, shares)
    assert (norm.launches, once.launches, update.launches) == (1, 1, 1)
    assert shares.end() is shares.total
    assert norm.launches == 1
