"""Programs as Triton kernels.

On a GPU, results are compared bit for bit with eager. Where there is none, one test runs those that
take ``device`` in a process of their own, in Triton's interpreter on the CPU. The interpreter has
no fused multiply-add, cuts off to round to bfloat16, and takes float arguments as float32: there,
float32 and float64 are tested within tolerances.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx import Proxy

from compileclip.fallback import UnsupportedError
from compileclip.lowering.program import Program

pytest.importorskip("triton")
from lowering_operations import CASES, LIBRARY, SCALARS, Build, one_operation, rmsprop, sgd
from lowering_programs import adamw, program, run_eager
from offline_cuda import compile_ptx
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

from compileclip.lowering.triton.triton_kernel import BLOCK, OPTIONS, Kernel, Tables
from compileclip.lowering.triton.triton_lists import block_list
from compileclip.lowering.triton.triton_module import load
from compileclip.lowering.triton.triton_norm import SECOND, Shares
from compileclip.lowering.triton.triton_source import source

__all__ = ["device"]  # a fixture
aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)
# Against eager on the CPU, of the larger of result and operands; observed: 2.0e-7 and 3.6e-16.
CLOSE = {torch.float32: 3e-7, torch.float64: 6e-16}
# Of libdevice's functions on a GPU, where torch has those of its CUDA version: units in the last
# place for float32 and float64, one of the half types. Not observed yet.
LAST_PLACES = {torch.float32: 4, torch.float64: 4, torch.bfloat16: 1, torch.float16: 1}
APPROXIMATE = r"\b(?:div|sqrt|rcp)\.(?:full|approx)|\.ftz"  # rsqrt is, in ATen too
# What is made of them is rounded as of exact ones; see test_half_precision_on_a_gpu.py.
EXACT_ALL_THE_SAME = {torch.bfloat16: {"sqrt.approx"}, torch.float16: {".ftz", "rcp.approx"}}
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def launch(
    made: Program,
    operands: Mapping[str, Sequence[Tensor]],
    scalars: Mapping[str, float],
    values: Mapping[str, Tensor],
) -> None:
    rows = [operands[n.name] for n in made.operands]
    device = rows[0][0].device
    sizes, kernel = [t.numel() for t in rows[0]], Kernel(made)
    tables = Tables(
        torch.tensor([[t.data_ptr() for t in row] for row in rows], device=device),
        torch.tensor(sizes, device=device),
        block_list(sizes, BLOCK).to(device),
        torch.zeros(kernel.slots, dtype=torch.int64, device=device),
    )
    norm = values.get("norm", torch.zeros((), device=device))
    kernel(tables, [scalars[n.name] for n in made.scalars], values, {}, Shares.ended(norm))


def ptx(made: Program) -> str:
    """What is compiled for a launch over one tensor."""
    table, sizes = torch.zeros(len(made.operands), 1, dtype=torch.int64), torch.zeros(1).long()
    step = load(source(made).text).compileclip_step
    arguments = (table, sizes, block_list([1], BLOCK), torch.zeros(9).long(), 1)
    return compile_ptx(step, *arguments, BLOCK=BLOCK, PACKED=True, **OPTIONS)


def check(actual: Tensor, expected: Tensor, last_places: int = 0) -> None:
    """Bit for bit on a GPU; in the interpreter, values up to about 1 within a tolerance."""
    eps = torch.finfo(actual.dtype).eps
    close = last_places * eps if actual.is_cuda else CLOSE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=close, atol=close, equal_nan=True)


def corners(dtype: torch.dtype, device: str) -> list[Tensor]:
    """Three operands: all combinations of special values, then random ones."""
    tiny, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    values = [0.0, 1.0, 0.5, 3.0, tiny, tiny / 8, most, math.inf]
    special = torch.tensor([*values, math.nan, *(-v for v in values)], dtype=dtype)
    grids = torch.meshgrid(special, special, special, indexing="ij")
    return [torch.cat((g.flatten(), torch.randn(5000, dtype=dtype))).to(device) for g in grids]


def results(
    name: str, dtype: torch.dtype, device: str, scalar: float = SCALARS["s"]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel and eager make of an operation, and their operands."""
    made = one_operation((CASES | LIBRARY)[name], dtype)
    tensors = dict(zip("xyz", corners(dtype, device), strict=True))
    tensors["out"] = torch.zeros_like(tensors["x"])
    expected = run_eager(made, tensors, {"s": scalar}, exact_sqrt=device == "cpu")["out"]
    launch(made, {k: [t] for k, t in tensors.items()}, {"s": scalar}, {})
    return tensors["out"], expected, torch.stack([tensors[k] for k in "xyz"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CASES, *LIBRARY])
def test_each_operation_rounds_as_aten_does(name: str, dtype: torch.dtype) -> None:
    for scalar in (SCALARS["s"], 0.1, 1 / 3, math.sqrt(0.001)):  # the others are no float32
        actual, expected, _ = results(name, dtype, "cuda", scalar)
        check(actual, expected, LAST_PLACES[dtype] if name in LIBRARY else 0)
        assert torch.equal(actual.signbit() | actual.isnan(), expected.signbit() | expected.isnan())


@pytest.mark.skipif(not INTERPRETED, reason="by test_in_the_interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_operation(name: str, dtype: torch.dtype) -> None:
    actual, expected, operands = results(name, dtype, "cpu")
    # Without a fused multiply-add, what overflows on the way and what is subnormal differ.
    sizes = operands.abs()
    usual = ((sizes > 1e-30) & (sizes < 1e30) | (sizes == 0) | sizes.isnan()).all(0)
    assert usual.sum() > 5000
    scale = torch.maximum(expected.abs(), sizes.nan_to_num().amax(0))
    close = ((actual - expected).abs() <= CLOSE[dtype] * scale) | (actual == expected)
    assert (close | (actual.isnan() & expected.isnan()))[usual].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("optimizer", [adamw, sgd, rmsprop])
def test_a_bucket(
    optimizer: Callable[[torch.dtype], Program], dtype: torch.dtype, shift: int, device: str
) -> None:
    made, sizes = optimizer(dtype), [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 0, 3 * BLOCK + 5]
    scalars = {n.name: float(torch.tensor(n.meta["val"])) for n in made.scalars}
    values = {n.name: torch.tensor(3.7, dtype=dtype, device=device) for n in made.values}
    buffers, tensors = {}, {}
    for node in made.operands:
        buffers[node.name] = [torch.rand(s + 9, dtype=dtype, device=device) for s in sizes]
        pairs = zip(buffers[node.name], sizes, strict=True)
        tensors[node.name] = [b[4 + shift : 4 + shift + s] for b, s in pairs]
    before = {k: [b.clone() for b in row] for k, row in buffers.items()}
    expected = [
        run_eager(made, {k: row[i] for k, row in tensors.items()}, scalars, values, INTERPRETED)
        for i in range(len(sizes))
    ]
    launch(made, tensors, scalars, values)
    for k, row in buffers.items():
        for i, size in enumerate(sizes):
            inside = slice(4 + shift, 4 + shift + size)
            check(row[i][inside], expected[i].get(k, before[k][i][inside]))
            assert k == "grad" or not size or not torch.equal(row[i], before[k][i])
            row[i][inside] = before[k][i][inside]
            assert torch.equal(row[i], before[k][i]), "elements outside were written"


def test_elements_beyond_the_range_of_32_bits(device: str) -> None:
    made = one_operation(CASES["mul scalar"], torch.float32)
    first = 2**33  # of a tensor whose other elements are not there, and not touched
    x, out = torch.randn(BLOCK, device=device), torch.zeros(BLOCK, device=device)
    row = [t.data_ptr() - first * 4 for t in (x, x, x, out)]
    table, sizes = torch.tensor(row, device=device)[:, None], torch.tensor([first + BLOCK])
    blocks = torch.tensor([[0, first // BLOCK]], dtype=torch.int32, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    tables = Tables(table, sizes.to(device), blocks, slots)
    Kernel(made)(tables, [0.5], {}, {}, Shares.ended(torch.zeros((), device=device)))
    assert torch.equal(out, x * 0.5)


def test_in_the_interpreter() -> None:
    """The tests above that take ``device``."""
    assert passed_in_the_interpreter(__file__) > 60


@compiled
def test_loads_are_wide_and_arithmetic_is_what_was_asked_for() -> None:
    code = ptx(adamw())
    # 8 elements per thread, 4 operands read and 3 written; the tail goes one element at a time.
    assert code.count("ld.global.v4.b32") == 2 * 4
    assert code.count("st.global.v4.b32") == 2 * 3
    # lerp has 2 (each way), addcmul 2 (value 1 or not), addcdiv 1; in the full block and the tail.
    assert code.count("fma.rn.f32") == 8 * 5 * 2
    assert "div.rn.f32" in code
    assert "sqrt.rn.f32" in code
    assert not re.findall(APPROXIMATE, code)


@compiled
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float64, "v2.b64"), (torch.bfloat16, "v4.b32"), (torch.float16, "v4.b32")],
    ids=str,
)
def test_other_dtypes_have_wide_loads(dtype: torch.dtype, wide: str) -> None:
    code = ptx(adamw(dtype))
    vectors = 8 * dtype.itemsize // 16
    assert code.count(f"ld.global.{wide}") == vectors * 4
    assert code.count(f"st.global.{wide}") == vectors * 3


@compiled
def test_a_product_and_a_sum_are_two_operations() -> None:
    code = ptx(one_operation(CASES["mul then add"], torch.float32))
    assert "fma" not in code
    assert code.count("mul.rn.f32") == code.count("add.rn.f32") == 8 * 2


@compiled
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("builds", [CASES, LIBRARY], ids=["own", "libdevice"])
def test_every_operation_compiles(builds: dict[str, Build], dtype: torch.dtype) -> None:
    def stores(x: Proxy, y: Proxy, z: Proxy, s: Proxy, **outs: Proxy) -> dict[str, Proxy]:
        return dict(zip(outs, (build(x, y, z, s) for build in builds.values()), strict=True))

    names = ["x", "y", "z", *(f"out{i}" for i in range(len(builds)))]
    code = ptx(program(stores, dict.fromkeys(names, dtype), SCALARS))
    if builds is CASES:  # libdevice's functions, which ATen calls too, are made of such parts
        found = set(re.findall(APPROXIMATE, code))
        assert found <= EXACT_ALL_THE_SAME.get(dtype, set())


@compiled
def test_one_kernel_serves_all_scalars_and_addresses() -> None:
    made = adamw()
    module = load(source(made).text)
    for scalar, count, shift in ((0.0, 1, 0), (1.0, 16, 1), (1e-300, 17, 0), (math.inf, 2**20, 3)):
        norm, shares = torch.zeros(8)[shift], torch.zeros(8).double()[shift:]
        table, sizes, slots = (torch.zeros(9).long()[shift:] for _ in range(3))
        scalars = [scalar] * len(made.scalars)
        given = (table, sizes, block_list([1], BLOCK), slots, count)
        compile_ptx(module.compileclip_step, *given, BLOCK=BLOCK, PACKED=True, **OPTIONS)
        given = (shares, norm, count - 1, slots, count, *scalars)
        constants = {"ORDER": "squares", "SCALED": False}
        compile_ptx(module.compileclip_once, *given, **constants, **SECOND)
    for kernel in (module.compileclip_step, module.compileclip_once):
        ((kernels, *_),) = kernel.device_caches.values()
        assert len(kernels) == 1


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(lambda x, y, z, s: aten.lgamma.default(x), torch.float32), (CASES["abs"], torch.int32)],
)
def test_what_has_no_code(build: Build, dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match="no Triton code for"):
        source(one_operation(build, dtype))


def test_a_source_cut_short_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    load.__wrapped__("answer = 41\n")
    (path,) = tmp_path.rglob("*.py")
    path.write_text("answer =")
    assert load.__wrapped__("answer = 41\n").answer == 41
    assert path.read_text() == "answer = 41\n"
