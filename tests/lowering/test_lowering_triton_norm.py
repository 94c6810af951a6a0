"""The total norm as Triton kernels, on a GPU or in Triton's interpreter; see triton_runs.py."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from compileclip.eager import reference

pytest.importorskip("triton")
from offline_cuda import compile_ptx
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

from compileclip.lowering.triton import triton_foreach, triton_norm, triton_norm_kernels
from compileclip.lowering.triton.triton_lists import block_list

__all__ = ["device"]  # a fixture
NORM_SIZES = [0, 1, 2047, 2048, 2049, triton_norm.CHUNK, triton_norm.CHUNK + 1, 3]


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(triton_foreach, "_is_there", lambda _: True)


def total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    found = triton_foreach.total_norm(tensors, norm_type)
    assert found is not None
    return found


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1.0), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30), (torch.float32, 1.0)]
    + [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e-44)]
    + [(torch.float64, 10.0**e) for e in (0, 300, -300, -160, 154, -320)],
)
def test_norm(dtype: torch.dtype, scale: float, norm_type: float, device: str) -> None:
    tensors = [(torch.randn(s + 1).double() * scale).to(device, dtype)[1:] for s in NORM_SIZES]
    for group in (tensors, [t.clone() for t in tensors]):  # misaligned and aligned
        actual = total_norm(group, norm_type)
        assert actual != 0
        # Sums in another order; observed: 0 in float32 and 8e-15 (norm_type=1) in float64.
        rtol = 2e-14 if dtype == torch.float64 else 0
        expected = reference._total_norm(group, norm_type)
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)
        assert torch.equal(actual, total_norm(group, norm_type))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_norm_in_float64(dtype: torch.dtype, norm_type: float, device: str) -> None:
    """As ranks add it up."""
    tensors = [torch.randn(s, device=device).to(dtype) for s in NORM_SIZES]
    for _ in range(2):  # on a GPU the second is launched by native code
        actual = triton_foreach.total_norm(tensors, norm_type, torch.float64)
        assert actual is not None
        assert actual.dtype == torch.float64
        expected = reference._total_norm(tensors, norm_type, torch.float64)
        # Sums in another order; observed: 3e-16.
        torch.testing.assert_close(actual, expected, rtol=2e-15, atol=0)
        narrow = total_norm(tensors, norm_type)
        assert torch.equal(actual.to(narrow.dtype), narrow)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_of_mixed_dtypes_and_what_is_not_finite(
    bad: float, norm_type: float, device: str
) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    tensors = [torch.randn(3000, device=device).to(d) for d in dtypes]
    tensors.append(torch.randn(40, 40, device=device).t()[::2])
    expected = reference._total_norm(tensors, norm_type)
    actual = total_norm(tensors, norm_type)
    # Sums in another order; observed: 4e-16.
    torch.testing.assert_close(actual, expected, rtol=2e-15, atol=0)
    for t in tensors:
        changed = [u.clone() if u is t else u for u in tensors]
        next(u for u, v in zip(changed, tensors, strict=True) if v is t)[-1] = bad
        found = total_norm(changed, norm_type)
        assert found.isnan() if math.isnan(bad) else found == math.inf


def test_norm_of_both_ends_of_float64(device: str) -> None:
    ends = torch.tensor([1e300, 1.0, 1e-300], dtype=torch.float64, device=device)
    small = torch.tensor([2.0**-511] * 3 + [2.0**-512] * 7, dtype=torch.float64, device=device)
    assert total_norm([ends], 2.0) == 1e300
    norm = total_norm([small], 2.0).item() * 2.0**512  # of both sides of a threshold
    assert norm == math.sqrt(19)
    nothing = torch.zeros(0, device=device)
    assert total_norm([nothing], 2.0) == 0
    assert total_norm([nothing], math.inf) == 0


def test_in_the_interpreter() -> None:
    """The tests above."""
    assert passed_in_the_interpreter(__file__) > 40


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("order", ["values", "squares", "max"])
@pytest.mark.parametrize("dtype", [*triton_norm.TYPES], ids=str)
def test_loads_are_wide_and_nothing_is_atomic(dtype: torch.dtype, order: str) -> None:
    scaled = order == "squares" and dtype == torch.float64
    constants = {"ORDER": order, "SCALED": scaled}
    shares = torch.zeros(3, 1, dtype=torch.float64)
    numbers = torch.zeros(1, dtype=torch.int64)
    first = compile_ptx(
        triton_norm_kernels.take_shares,
        *(numbers, numbers, block_list([1], 1), shares, 0, 1),
        DTYPE=triton_norm.TYPES[dtype],
        WIDE=triton_norm._wide(dtype, math.inf if order == "max" else 1.0),
        CHUNK=triton_norm.CHUNK,
        **constants,
        **triton_norm._FIRST,
    )
    second = compile_ptx(
        triton_norm_kernels.add_shares,
        *(shares, torch.zeros(()), 1),
        **constants,
        **triton_norm.SECOND,
    )
    wide = "v2.b64" if dtype == torch.float64 else "v4.b32"
    assert first.count(f"ld.global.{wide}") == 16 * dtype.itemsize // 16
    assert not re.findall(r"\b(?:atom|red)\b|\.ftz", first + second)
    assert ("sqrt.rn.f64" in second) == (order == "squares")


@pytest.mark.parametrize(
    ("dtype", "norm_type"),
    [(torch.float32, 3.0), (torch.float32, 0.0), (torch.complex64, 2.0)],
)
def test_what_has_no_kernel(
    dtype: torch.dtype, norm_type: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_foreach, "_is_there", lambda _: True)
    assert triton_foreach.total_norm([torch.zeros(3, dtype=dtype)], norm_type) is None
