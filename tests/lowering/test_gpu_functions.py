"""The functions of torch.nn.utils on a GPU: one norm for all, one kernel that scales or clamps.

On a GPU, or in Triton's interpreter on the CPU; see triton_runs.py.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import same
from torch import Tensor, nn

import compileclip
from compileclip.eager import reference
from compileclip.lowering.triton import triton_foreach

pytest.importorskip("triton")
from offline_cuda import compile_ptx
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

from compileclip.lowering.triton import triton_norm, triton_scale
from compileclip.lowering.triton.triton_lists import block_list

__all__ = ["device"]  # a fixture
SIZES = [0, 1, 2047, 2048, 2049, triton_norm.CHUNK, triton_norm.CHUNK + 1, 3]
DTYPES = [torch.float32, torch.float64, torch.float16]
DTYPES += [pytest.param(torch.bfloat16, marks=[pytest.mark.gpu])]  # rounded otherwise there


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(triton_foreach, "_is_there", lambda _: True)


def tensors(dtype: torch.dtype, device: str, shift: int) -> list[Tensor]:
    return [(torch.randn(s + shift) * 3).to(device, dtype)[shift:] for s in SIZES]


def scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    """In float32 or float64, and rounded once."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * factor.to(wide)).to(tensor.dtype)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_clip_and_clamp(dtype: torch.dtype, shift: int, device: str) -> None:
    for number in (0.1, 1 / 3, 1.0, 2.5, math.nan, math.inf, 0.0):
        factor = torch.tensor(number, device=device)
        given = tensors(dtype, device, shift)
        before = [t.clone() for t in given]
        assert triton_foreach.scale_(given, factor)
        assert all(map(same, given, [scaled(t, factor) for t in before]))

        norm_dtype = torch.promote_types(dtype, torch.float32)
        norm = torch.tensor(number, device=device, dtype=norm_dtype)
        given = [t.clone() for t in before]
        assert triton_foreach.clip_(given, 0.7, norm)
        factor = reference.clip_coef(0.7, norm)
        assert all(map(same, given, [scaled(t, factor) for t in before]))

        given = [t.clone() for t in before]
        assert triton_foreach.clamp_(given, number)
        # Bounds are float32 for half precision, and what they leave is rounded.
        bound = torch.tensor(number, dtype=norm_dtype).to(dtype).item()
        expected = [t.clamp(-bound, bound) for t in before]
        assert all(map(torch.equal, map(torch.nan_to_num, given), map(torch.nan_to_num, expected)))


def test_nothing_is_written_twice(device: str) -> None:
    flat = torch.ones(10, device=device)
    factor = torch.tensor(2.0, device=device)
    assert not triton_foreach.scale_([flat, flat], factor)
    assert not triton_foreach.scale_([flat[:6], flat[5:]], factor)
    assert not triton_foreach.scale_([flat[::2]], factor)
    assert not triton_foreach.scale_([torch.ones(1, device=device).expand(3)], factor)
    assert torch.equal(flat, torch.ones_like(flat))
    assert triton_foreach.scale_([flat[5:], flat[:5]], factor)
    assert torch.equal(flat, torch.full_like(flat, 2.0))
    assert triton_foreach.scale_([torch.ones(4, 3, device=device).t()], factor)


def test_numbers_that_are_not_computed_with_here(device: str) -> None:
    """Their rounding is torch's business."""
    given = [torch.ones(3, device=device)]
    for number in (torch.ones((), dtype=torch.bfloat16), torch.ones(1), torch.ones((), dtype=int)):
        assert not triton_foreach.clip_(given, 0.5, number.to(device))
        assert not triton_foreach.scale_(given, number.to(device))
    assert torch.equal(given[0], torch.ones_like(given[0]))


def test_what_has_no_memory_is_torchs_business(device: str) -> None:
    """And of no consequence for the next."""

    def norm(x: Tensor) -> Tensor:
        assert triton_foreach.total_norm([x], 2.0) is None
        assert not triton_foreach.scale_([x], torch.ones((), device=device))
        return x.norm()

    batch = torch.randn(3, 5, device=device)
    assert torch.func.vmap(norm)(batch).shape == (3,)
    assert triton_foreach.total_norm([batch], 2.0) is not None


def test_what_is_written_is_told_to_autograd(device: str) -> None:
    x = torch.ones(3, device=device, requires_grad=True)
    kept = x.detach() * 2
    loss = (x * kept).sum()
    assert triton_foreach.scale_([kept], torch.tensor(2.0, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_mixed_dtypes_are_one_norm_and_a_list_each(device: str) -> None:
    given = [torch.randn(300).to(device, d) for d in (torch.float32, torch.float16, torch.float64)]
    before = [t.clone() for t in given]
    norm = triton_foreach.total_norm(given, 2.0)
    assert norm is not None
    assert norm.dtype == torch.float64
    # Sums in another order; observed: 0.
    torch.testing.assert_close(norm, reference._total_norm(given, 2.0), rtol=2e-15, atol=0)
    assert triton_foreach.clip_(given, 0.5, norm)
    factor = reference.clip_coef(0.5, norm)
    assert all(map(same, given, [scaled(t, factor) for t in before]))


def test_in_the_interpreter() -> None:
    """The tests above."""
    assert passed_in_the_interpreter(__file__) >= 9


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", ["scale", "clip", "clamp"])
@pytest.mark.parametrize("dtype", [*triton_norm.TYPES], ids=str)
def test_loads_and_stores_are_wide(dtype: torch.dtype, kind: str) -> None:
    double = dtype == torch.float64
    numbers = torch.zeros(1, dtype=torch.int64)
    code = compile_ptx(
        triton_scale._write,
        *(numbers, numbers, block_list([1], 1), torch.zeros(()), 0.1),
        DTYPE=triton_norm.TYPES[dtype],
        COMPUTE=triton_norm.TYPES[torch.float64 if double else torch.float32],
        KIND=kind,
        CHUNK=triton_norm.CHUNK,
        PACKED=True,
        **triton_scale._OPTIONS,
    )
    wide = "v2.b64" if double else "v4.b32"
    assert code.count(f"ld.global.{wide}") == 16 * dtype.itemsize // 16
    assert code.count(f"st.global.{wide}") == 16 * dtype.itemsize // 16
    assert not re.findall(r"\b(?:atom|red)\b|\.ftz|(?:div|rcp)\.(?:full|approx)", code)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clip_grad_norm_takes_three_launches(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(32, 32, device="cuda", dtype=dtype)) for _ in range(2000)]
    for p in params:
        p.grad = torch.ones_like(p)
    compileclip.clip_grad_norm_(params, 2.0)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        norm = compileclip.clip_grad_norm_(params, 1.0)
        torch.cuda.synchronize()
    launches = sum(e.count for e in profile.key_averages() if "LaunchKernel" in e.key)
    assert launches <= 3
    assert norm.item() == pytest.approx(2.0, rel=1e-2)


@pytest.mark.gpu
def test_every_caller_has_the_same_norm() -> None:
    params = [nn.Parameter(torch.randn(s, device="cuda")) for s in ((64, 33), (7,), (), (1000, 13))]
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in params if p.grad is not None]
    norm = compileclip.get_total_norm(grads)
    assert same(norm, torch.ops.compileclip.total_norm(grads, 2.0))
    for mode in ("eager", "auto", "multi_tensor"):
        opt = compileclip.wrap(torch.optim.SGD(params, lr=0.0), None, mode=mode)
        opt.step()
        assert same(opt.total_norm, norm)
    assert same(norm, compileclip.clip_grad_norm_(params, 1e9))
