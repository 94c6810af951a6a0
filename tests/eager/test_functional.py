"""The four functions against torch.nn.utils, and where they are better than it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from functional_cases import FOREACH, ORDERS, grads_of, true_norm
from helpers import assert_same, same, set_grads
from torch import nn
from torch.nn import utils

import compileclip
from compileclip.eager import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def random_grads(dtype: torch.dtype, scale: float = 1.0) -> list[Any]:
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in ((10, 10), (10,), (), (3, 1, 7))]
    set_grads(params, seed=1, scale=scale)
    return params


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e4, math.inf])
@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gradients(
    dtype: torch.dtype, norm_type: float, max_norm: float, foreach: bool | None
) -> None:
    ours, theirs = random_grads(dtype), random_grads(dtype)
    norm = compileclip.clip_grad_norm_(ours, max_norm, norm_type, foreach=foreach)
    reference = utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach)
    if dtype == torch.float64 and norm_type in (0, 1, 2, math.inf, -math.inf):
        assert same(norm, reference)
        assert_same(grads_of(ours), grads_of(theirs), "gradient")
        return
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if norm_type != 0:
        truth = true_norm(grads_of(random_grads(dtype)), norm_type)
        # observed: 6e-8 in float32; in float64 3e-16, and 2.3e-15 at p = 0.1, whose root is x**10
        rel = 1.2e-7 if dtype != torch.float64 else 1e-14 if abs(norm_type) < 1 else 1e-15
        assert norm.item() == pytest.approx(truth, rel=rel)
    # The scale is applied in float32 or wider and rounded once, to the gradient's dtype.
    coef = min(1.0, max_norm / (norm.item() + 1e-6))
    tolerance = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 2e-7)
    for a, b in zip(grads_of(ours), grads_of(random_grads(dtype)), strict=True):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        torch.testing.assert_close(a.to(wide), b.to(wide) * coef, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_float32_norm_and_scale(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(300, 300, dtype=dtype))
    param.grad = torch.full((300, 300), 3.0, dtype=dtype)
    norm = compileclip.clip_grad_norm_([param], 1.0)
    assert same(norm, torch.tensor(900.0))
    expected = (torch.full((300, 300), 3.0) * (1.0 / (norm + 1e-6))).to(dtype)
    assert_same([param.grad], [expected], "gradient scaled in float32")


def test_bfloat16_where_torch_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: as by torch's kernel on a CPU, in pieces, over whatever layout."""
    monkeypatch.setattr(reference, "_WIDENED", 100)
    base = torch.randn(3000).to(torch.bfloat16)
    tensors = [base[:1], base[1:1], base[2:252], base[252:352].view(5, 20).t(), base[400:1000:3]]
    tensors += [base[1000 + 30 * i : 1030 + 30 * i] for i in range(9)]
    theirs, factor = base.clone(), torch.tensor(1 / 3)
    pairs = [t.as_strided(t.shape, t.stride(), t.storage_offset()) for t in tensors]
    copies = [theirs.as_strided(t.shape, t.stride(), t.storage_offset()) for t in pairs]
    pieces = list(reference._in_pieces(tensors, 100))
    assert max(sum(t.numel() for t in piece) for piece in pieces if len(piece) > 1) <= 100
    assert sum(t.numel() for piece in pieces for t in piece) == sum(t.numel() for t in tensors)
    reference._multiply_widened(tensors, factor)
    torch._amp_foreach_non_finite_check_and_unscale_(copies, torch.zeros(()), factor)
    assert same(base, theirs)


def test_no_finite_gradient_overflows_and_none_vanishes() -> None:
    for dtype, sizes in {
        torch.bfloat16: (1e38, 1e-38),
        torch.float32: (1e38, 1e-30, 1e-44),
        torch.float64: (1e300, 1e-300, 5e-324),
        torch.complex64: (1e38, 1e-30),
        torch.complex128: (1e300, 1e-300),
    }.items():
        for size in sizes:
            for p in (1.0, 2.0, 3.5, 8.0, 40.0, -1.0, -2.0, -8.0):
                grads = [torch.full((2, 2), size, dtype=dtype), torch.full((4,), size, dtype=dtype)]
                element = grads[0][0, 0].abs().double().item()
                truth = element * 8 ** (1 / p)
                if not 1e-323 < truth < 1.7e308 or (dtype != torch.float64 and truth > 3.4e38):
                    continue
                norm = compileclip.get_total_norm(grads, p).item()
                # A subnormal result has fewer digits.
                step = 5e-324 if norm < 1e-300 else 1.5e-45 if norm < 1e-37 else 0.0
                assert norm == pytest.approx(truth, rel=1.2e-7, abs=step), (dtype, size, p)


def test_float64_norm_is_torchs() -> None:
    """But for the order of the sums, which here the number of threads leaves as it is."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        grads = [
            torch.randn(n, dtype=torch.float64, generator=generator) * 10.0 ** (seed - 10)
            for n in (1, 7, 64, 1000, 40000)
        ]
        expected = utils.get_total_norm(grads).item()
        # Observed: 1.9e-16.
        assert compileclip.get_total_norm(grads).item() == pytest.approx(expected, rel=1e-15)


def test_float32_sums_lose_nothing() -> None:
    """Torch sums the squares in float32; over 4 million equal elements that shows."""
    grads = [torch.full((1 << 22,), 0.1)]
    truth = true_norm(grads, 2.0)
    assert compileclip.get_total_norm(grads).item() == pytest.approx(truth, rel=6e-8)
    assert abs(utils.get_total_norm(grads).item() / truth - 1) > 2e-7


@pytest.mark.parametrize("norm_type", ORDERS)
def test_mixed_dtypes_promote(norm_type: float) -> None:
    grads = [torch.randn(5).to(d) for d in (torch.bfloat16, torch.float16, torch.float32)]
    norm = compileclip.get_total_norm(grads, norm_type)
    assert norm.dtype == torch.float32
    if norm_type != 0:
        assert norm.item() == pytest.approx(true_norm(grads, norm_type), rel=1.2e-7)
    grads.append(torch.randn(5, dtype=torch.float64))
    assert compileclip.get_total_norm(grads, norm_type).dtype == torch.float64


@pytest.mark.parametrize("norm_type", ORDERS)
def test_odd_tensors(norm_type: float) -> None:
    """Empty, 0-dim, transposed, strided, channels_last and expanded tensors."""
    base = torch.randn(6, 8)
    odd = [
        torch.randn(()),
        base.t(),
        base[::2, 1::3],
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 1).expand(3, 4),
        torch.randn(1 << 17).view(2, -1).t(),  # more than one piece, and not contiguous
    ]
    if norm_type != 0:
        # p = 0.1 of 131,000 elements is 8.5e50, which float32 calls inf
        truth = torch.tensor(true_norm(odd, norm_type)).item()
        expected = pytest.approx(truth, rel=1.2e-7)
        assert compileclip.get_total_norm(odd, norm_type).item() == expected
    with_empty = [torch.zeros(0), *odd, torch.zeros(2, 0)]
    assert same(
        compileclip.get_total_norm(with_empty, norm_type),
        compileclip.get_total_norm(odd, norm_type),
    )
    assert same(compileclip.get_total_norm([torch.zeros(0)], norm_type), torch.tensor(0.0))
    params = [nn.Parameter(torch.zeros_like(t)) for t in odd if t.dim() != 2 or t.shape != (3, 4)]
    for p, t in zip(params, [t for t in odd if t.shape != (3, 4)], strict=True):
        p.grad = t.clone()
    norm = compileclip.get_total_norm([p.grad for p in params], 2.0)
    expected_grads = [p.grad * (1.0 / (norm + 1e-6)) for p in params]
    compileclip.clip_grad_norm_(params, 1.0)
    assert_same([p.grad for p in params], expected_grads, "gradient")


@pytest.mark.parametrize("foreach", [None, False])
def test_sparse_gradients(foreach: bool | None) -> None:
    indices = torch.tensor([[0, 2, 2, 5]])  # row 2 twice: not coalesced
    sparse = torch.sparse_coo_tensor(indices, torch.randn(4, 3), (6, 3), check_invariants=True)
    dense_param, sparse_param, other = (nn.Parameter(torch.zeros(6, 3)) for _ in range(3))
    for p in (0.5, 1.0, 2.0, 4.0, math.inf):
        dense_param.grad, sparse_param.grad = sparse.to_dense(), sparse.clone()
        norm = compileclip.clip_grad_norm_([sparse_param], 0.1, p, foreach=foreach)
        reference = compileclip.clip_grad_norm_([dense_param], 0.1, p)
        assert norm.item() == pytest.approx(reference.item(), rel=1e-7)
        assert sparse_param.grad.is_sparse
        torch.testing.assert_close(sparse_param.grad.to_dense(), dense_param.grad)
    dense_param.grad, sparse_param.grad = sparse.to_dense(), sparse.clone()
    compileclip.clip_grad_value_([sparse_param], 0.3, foreach=foreach)
    compileclip.clip_grad_value_([dense_param], 0.3)
    torch.testing.assert_close(sparse_param.grad.to_dense(), dense_param.grad)
    other.grad = torch.ones(6, 3)
    for p in (0.0, -1.0, -math.inf):
        before = sparse_param.grad.clone()
        with pytest.raises(ValueError, match=f"norm_type={p} of a sparse gradient"):
            compileclip.clip_grad_norm_([other, sparse_param], 1.0, p, foreach=foreach)
        assert_same([other.grad], [torch.ones(6, 3)], "gradient after an error")
        assert_same([sparse_param.grad.to_dense()], [before.to_dense()], "sparse gradient")


def test_bad_input() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="norm_type is nan"):
        compileclip.clip_grad_norm_(p, 1.0, math.nan)
    meta = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="foreach API on meta tensors"):
        compileclip.get_total_norm([meta], foreach=True)
    assert compileclip.get_total_norm([meta]).is_meta  # as torch: a shape without a value
    with pytest.raises(ValueError, match="sparse_csr has no total norm"):
        compileclip.get_total_norm(torch.eye(3).to_sparse_csr())
    # A negative or NaN max_norm does what it does in torch.
    for max_norm in (-1.0, math.nan):
        theirs = nn.Parameter(torch.zeros(3))
        p.grad, theirs.grad = torch.ones(3), torch.ones(3)
        compileclip.clip_grad_norm_(p, max_norm)
        utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(p.grad, theirs.grad, equal_nan=True)


def test_result_does_not_require_grad() -> None:
    p = nn.Parameter(torch.ones(3))
    (grad,) = torch.autograd.grad(p.pow(3).sum(), p, create_graph=True)
    assert grad.requires_grad
    assert not compileclip.get_total_norm([grad]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_clipped_is_not_written(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(5, dtype=dtype))
    p.grad = torch.randn(5).to(dtype)
    before, version = p.grad.clone(), p.grad._version
    compileclip.clip_grad_norm_([p], 1e3)
    compileclip.clip_grads_with_norm_([p], 1e3, torch.tensor(7.0))
    assert p.grad._version == version
    assert same(p.grad, before)
    compileclip.clip_grad_norm_([p], 1e-3)
    assert p.grad._version > version
    assert compileclip.get_total_norm([p.grad]) < 1e-3 + 1e-5


def test_a_norm_that_is_nan_is_not_taken_for_one_that_clips_nothing() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, math.nan])
    compileclip.clip_grad_norm_([p], 1e3)
    assert p.grad.isnan().all()


def test_a_norm_under_vmap_stands_for_many() -> None:
    grad = torch.ones(3)

    def clipped(norm: torch.Tensor) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(3))
        p.grad = grad * norm / norm  # of its own in each
        compileclip.clip_grads_with_norm_([p], 1.0, norm, foreach=False)
        return p.grad

    found = torch.func.vmap(clipped)(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found, torch.tensor([[1.0] * 3, [0.5] * 3]))
