"""torch's own tests of the four functions (test/test_nn.py), with the import replaced.

assert_close stands for its assertEqual, with the same tolerances.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from functional_cases import FOREACH, ORDERS, grads_of, true_norm
from helpers import assert_same, same
from torch import Tensor, nn
from torch.nn import utils

import compileclip


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("norm_type", [*ORDERS, "inf"])
def test_torchs_clip_grad_norm(norm_type: Any, foreach: bool | None) -> None:
    linear, p = nn.Linear(10, 10), float(norm_type)
    max_norm = 2.0 if p != 0 else 1.0

    def compute_norm() -> Tensor:
        if p == 0:  # torch counts the tensors with a non-zero element
            return torch.tensor(float(sum(bool(q.grad.any()) for q in linear.parameters())))
        return torch.tensor(true_norm([q.grad for q in linear.parameters()], p))

    def scaled_by(grads: tuple[Tensor, ...]) -> Tensor:
        ratios = [q.grad.div(g).view(-1) for q, g in zip(linear.parameters(), grads, strict=True)]
        scale = torch.cat(ratios)
        torch.testing.assert_close(scale.std(), torch.tensor(0.0))
        return scale[0]

    large = torch.arange(1.0, 101).view(10, 10), torch.ones(10).div(1000)
    if p < 0:  # a norm of negative order is governed by the smallest element
        large = tuple(g + 1000 for g in large)
    for decomposed in (False, True):
        for q, g in zip(linear.parameters(), large, strict=True):
            q.grad = g.clone()
        before = compute_norm()
        if decomposed:
            norm = compileclip.get_total_norm(
                [q.grad for q in linear.parameters()], p, foreach=foreach
            )
            compileclip.clip_grads_with_norm_(linear.parameters(), max_norm, norm, foreach)
        else:
            norm = compileclip.clip_grad_norm_(
                linear.parameters(), max_norm, norm_type=norm_type, foreach=foreach
            )
        torch.testing.assert_close(norm, before)
        scale = scaled_by(large)
        assert scale == pytest.approx(min(1.0, max_norm / (before.item() + 1e-6)), rel=1e-5)
        if p != 0:
            torch.testing.assert_close(compute_norm(), before.clamp(max=max_norm))
            assert compute_norm() <= before

    small = torch.rand(10, 10).div(10000) + 1e-7, torch.ones(10).div(500)
    for q, g in zip(linear.parameters(), small, strict=True):
        q.grad = g.clone()
    before = compute_norm()
    bound = before.item() * 2 + 1e-3  # p = 0.1 makes a large norm of small numbers
    norm = compileclip.clip_grad_norm_(linear.parameters(), bound, norm_type, foreach=foreach)
    torch.testing.assert_close(norm, before)
    assert scaled_by(small) == 1  # exactly
    assert_same([q.grad for q in linear.parameters()], small, "unclipped gradient")


@pytest.mark.parametrize("foreach", FOREACH)
def test_torchs_clip_grad_value(foreach: bool | None) -> None:
    linear, clip_value = nn.Linear(10, 10), 2.5
    w, b = torch.arange(-50.0, 50).view(10, 10).div(5), torch.ones(10).mul(2)
    for grads in ([w, b], [w, None]):
        for p, g in zip(linear.parameters(), grads, strict=True):
            p.grad = g.clone().view_as(p) if g is not None else g
        compileclip.clip_grad_value_(linear.parameters(), clip_value, foreach=foreach)
        for p in filter(lambda q: q.grad is not None, linear.parameters()):
            assert p.grad.max() <= clip_value
            assert p.grad.min() >= -clip_value
    p1, p2 = torch.randn(10, 10), torch.randn(10, 10)
    g = torch.arange(-50.0, 50).view(10, 10).div(5)
    p1.grad, p2.grad = g.clone(), g.clone()
    compileclip.clip_grad_value_(p1, clip_value, foreach=foreach)  # a tensor or a list of one
    compileclip.clip_grad_value_([p2], clip_value, foreach=foreach)
    assert_same([p1.grad], [p2.grad], "single parameter")
    assert_same([p1.grad], [g.clamp(-clip_value, clip_value)], "clamped gradient")


def with_special_grad(scalar: float, one_element: bool, prefix: bool) -> list[Any]:
    param = torch.ones(10, dtype=torch.float64, requires_grad=True)
    (param[1] if one_element else param).mul(scalar).sum().backward()
    finite = torch.ones(1, dtype=torch.float64, requires_grad=True)
    finite.sum().backward()
    return [finite, param] if prefix else [param]


@pytest.mark.parametrize("foreach", FOREACH)
@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("scalar", [math.inf, -math.inf, math.nan, 2e22, 2e200, 2e-200, 0.0])
def test_torchs_error_if_nonfinite(scalar: float, norm_type: float, foreach: bool | None) -> None:
    for one_element, prefix in itertools.product((False, True), (False, True)):
        ours, theirs = (with_special_grad(scalar, one_element, prefix) for _ in range(2))
        before = grads_of(ours)
        reference = utils.get_total_norm(before, norm_type, foreach=foreach)
        # Of a finite gradient torch's float64 norm overflows where ours must not.
        if reference.isfinite() or math.isfinite(scalar):
            norm = compileclip.clip_grad_norm_(ours, 1.0, norm_type, True, foreach)
            assert norm.isfinite()
            continue
        message = f"The total norm of order {norm_type} for gradients"
        with pytest.raises(RuntimeError, match=message):
            compileclip.clip_grad_norm_(ours, 1.0, norm_type, True, foreach)
        assert_same(grads_of(ours), before, "gradient after an error")
        norm = compileclip.clip_grad_norm_(ours, 1.0, norm_type, False, foreach)
        assert same(norm, utils.clip_grad_norm_(theirs, 1.0, norm_type, False, foreach))
        assert_same(grads_of(ours), grads_of(theirs), "gradient scaled by a non-finite norm")


def test_torchs_single_tensor_generators_and_none() -> None:
    p = torch.randn(4, 4, requires_grad=True)
    p.grad = torch.ones(4, 4)
    other = torch.randn(2, requires_grad=True)  # no gradient
    assert compileclip.clip_grad_norm_(p, 1.0) == 4
    p.grad = torch.ones(4, 4)
    assert compileclip.clip_grad_norm_((q for q in (p, other)), 1.0) == 4
    torch.testing.assert_close(p.grad, torch.full((4, 4), 0.25))
    assert other.grad is None
    with pytest.warns(UserWarning, match="empty generator"):
        norm = compileclip.clip_grad_norm_((q for q in ()), 1.0)
    assert same(norm, torch.tensor(0.0))
    assert same(compileclip.clip_grad_norm_([], 1.0), torch.tensor(0.0))
    assert same(compileclip.clip_grad_norm_([other], 1.0), torch.tensor(0.0))
    assert same(compileclip.get_total_norm([]), torch.tensor(0.0))
    assert same(compileclip.get_total_norm(torch.full((9,), 2.0)), torch.tensor(6.0))
    compileclip.clip_grads_with_norm_([other], 1.0, torch.tensor(2.0))
    compileclip.clip_grad_value_([other], 1.0)
    compileclip.clip_grad_value_([], 1.0)
