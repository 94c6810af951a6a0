"""Kernels for a GPU against a model of ATen's CUDA kernels, bit for bit, without a GPU.

In Triton's interpreter, made to round as a GPU does.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from aten_cuda import MODEL, run_model
from exact_fma import fma
from lowering_operations import CASES, SCALARS, Build, one_operation
from lowering_programs import program, run_eager
from torch import Tensor
from torch.fx import Proxy

from compileclip.lowering.program import Program

pytest.importorskip("triton")
from exact_interpreter import make_exact
from test_lowering_triton import launch
from triton_runs import INTERPRETED, passed_in_the_interpreter

aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
in_the_interpreter = pytest.mark.skipif(not INTERPRETED, reason="by test_in_the_interpreter")
# Each operation that takes a scalar, with it in each place.
TAKING_SCALARS: dict[str, Build] = {
    "add": lambda x, y, z, s: aten.add.Tensor(x, s),
    "add alpha": lambda x, y, z, s: aten.add.Tensor(x, y, alpha=s),
    "add scalar alpha": lambda x, y, z, s: aten.add.Tensor(x, 0.3, alpha=s),
    "sub": lambda x, y, z, s: aten.sub.Tensor(x, s),
    "sub alpha": lambda x, y, z, s: aten.sub.Tensor(x, y, alpha=s),
    "rsub": lambda x, y, z, s: aten.rsub.Scalar(x, s),
    "rsub alpha": lambda x, y, z, s: aten.rsub.Scalar(x, 0.7, s),
    "mul": lambda x, y, z, s: aten.mul.Tensor(x, s),
    "div": lambda x, y, z, s: aten.div.Tensor(x, s),
    "clamp": lambda x, y, z, s: aten.clamp.default(x, s, 0.9),
    "clamp most": lambda x, y, z, s: aten.clamp.default(x, None, s),
    "lerp": lambda x, y, z, s: aten.lerp.Scalar(x, y, s),
    "addcmul": lambda x, y, z, s: aten.addcmul.default(x, y, z, value=s),
    "addcdiv": lambda x, y, z, s: aten.addcdiv.default(x, y, z, value=s),
    "where": lambda x, y, z, s: aten.where.ScalarOther(aten.gt.Tensor(x, y), z, s),
    "full_like": lambda x, y, z, s: aten.full_like.default(x, s),
    "eq": lambda x, y, z, s: aten.mul.Tensor(aten.eq.Scalar(x, s), y),
    "ne": lambda x, y, z, s: aten.mul.Tensor(aten.ne.Scalar(x, s), y),
    "gt": lambda x, y, z, s: aten.mul.Tensor(aten.gt.Scalar(x, s), y),
    "lt": lambda x, y, z, s: aten.mul.Tensor(aten.lt.Scalar(x, s), y),
    "ge": lambda x, y, z, s: aten.mul.Tensor(aten.ge.Scalar(x, s), y),
    "le": lambda x, y, z, s: aten.mul.Tensor(aten.le.Scalar(x, s), y),
}
NUMBERS = [0.1, 1 / 3, math.sqrt(0.001), -0.3, 1e-8, 0.999, 1 - 0.999, 3.7e5, 1.0, 0.5, -1.0, 0.0]
NUMBERS += [float(f"{x:.17g}") for x in np.random.default_rng(0).normal(size=44)]
UNORDERED = {"maximum", "minimum", "clamp", "clamp most"}  # of two zeros, either may come


def elements(dtype: torch.dtype, count: int) -> list[Tensor]:
    """Three operands: special values, and random ones."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.0, -0.5, 3.0, math.inf, -math.inf, math.nan]
    values += [info.tiny, -info.tiny / 4, info.max]
    special = torch.tensor(values, dtype=torch.float64)
    grids = torch.meshgrid(special, special, special, indexing="ij")
    return [torch.cat((g.flatten(), torch.randn(count).double())).to(dtype) for g in grids]


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), (name, actual[~same][:5], expected[~same][:5])
    if name not in UNORDERED:
        number = ~expected.isnan()
        assert torch.equal(actual.signbit()[number], expected.signbit()[number]), name


OUTS = {f"out{i}": name for i, name in enumerate(TAKING_SCALARS)}


def with_scalars(dtype: torch.dtype) -> Program:
    """A program with all of ``TAKING_SCALARS``."""

    def stores(x: Proxy, y: Proxy, z: Proxy, s: Proxy, **outs: Proxy) -> dict[str, Proxy]:
        return {k: TAKING_SCALARS[OUTS[k]](x, y, z, s) for k in outs}

    return program(stores, dict.fromkeys(("x", "y", "z", *OUTS), dtype), SCALARS)


def numbers_for(dtype: torch.dtype) -> list[float]:
    found = [x for x in NUMBERS if abs(x) < torch.finfo(dtype).max]
    assert len(found) >= 50
    return found


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_operation_with_scalars(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    make_exact(monkeypatch)
    made = with_scalars(dtype)
    for number in numbers_for(dtype):
        tensors = dict(zip("xyz", elements(dtype, 700), strict=True))
        tensors |= {out: torch.zeros_like(tensors["x"]) for out in OUTS}
        expected = run_model(made, tensors, {"s": number})
        launch(made, {k: [t] for k, t in tensors.items()}, {"s": number}, {})
        for out, name in OUTS.items():
            check(name, tensors[out], expected[out])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_and_the_model_are_as_aten_on_a_gpu(dtype: torch.dtype) -> None:
    made = with_scalars(dtype)
    for number in numbers_for(dtype)[::5]:
        tensors = dict(zip("xyz", elements(dtype, 2000), strict=True))
        tensors |= {out: torch.zeros_like(tensors["x"]) for out in OUTS}
        there = {k: t.cuda() for k, t in tensors.items()}
        expected = run_eager(made, there, {"s": number}, exact_sqrt=False)
        modelled = run_model(made, tensors, {"s": number})
        launch(made, {k: [t] for k, t in there.items()}, {"s": number}, {})
        for out, name in OUTS.items():
            check(name, there[out].cpu(), expected[out].cpu())
            check(name, modelled[out], expected[out].cpu())


@in_the_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n != "rsqrt"])
def test_each_operation(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """``rsqrt`` is an approximation, in ATen too."""
    make_exact(monkeypatch)
    made = one_operation(CASES[name], dtype)
    for number in (0.1, 1 / 3, 0.734375, -2.7):
        tensors = dict(zip("xyz", elements(dtype, 3000), strict=True))
        tensors["out"] = torch.zeros_like(tensors["x"])
        expected = run_model(made, tensors, {"s": number})["out"]
        launch(made, {k: [t] for k, t in tensors.items()}, {"s": number}, {})
        unordered = "clamp" if name.startswith(("clamp", "max", "min", "relu")) else name
        check(unordered, tensors["out"], expected)


def test_the_model_has_each_operation() -> None:
    used = {
        node.target
        for build in (*CASES.values(), *TAKING_SCALARS.values())
        for node in one_operation(build, torch.float32).graph.nodes
        if node.op == "call_function"
    }
    assert used - MODEL.keys() == {aten._to_copy.default, aten.rsqrt.default}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_against_fractions(dtype: type) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 3000)).astype(dtype)
    z = (-x * y * (1 + np.round(generator.normal(size=3000), 1) * np.finfo(dtype).eps)).astype(
        dtype
    )
    z[::3] = generator.normal(size=1000)
    scales = [dtype(2.0**e) for e in (0, -60, 60)]
    for a, b, c in product(scales, scales, [1.0]):
        found = fma(x * a, y * b, z * a * b * dtype(c))
        for i in range(0, 3000, 7):
            given = [Fraction(float(v)) for v in (x[i] * a, y[i] * b, z[i] * a * b)]
            exact = given[0] * given[1] + given[2]
            down, up = np.nextafter(found[i], dtype(-np.inf)), np.nextafter(found[i], dtype(np.inf))
            error = abs(Fraction(float(found[i])) - exact)
            assert all(error <= abs(Fraction(float(v)) - exact) for v in (down, up))


def test_in_the_interpreter() -> None:
    """The tests above."""
    assert passed_in_the_interpreter(__file__) >= 4 * len(CASES)
