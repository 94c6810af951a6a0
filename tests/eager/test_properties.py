"""Properties of the total norm and of clipping, by hypothesis."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compileclip

many = settings(max_examples=200)


@pytest.fixture(autouse=True, scope="module", params=["", "1"], ids=["compiled", "eager"])
def _both(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test with the native norm, and with everything compiled switched off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPILECLIP_DISABLE", request.param)
        yield


@st.composite
def gradients(
    draw: Any, sizes: tuple[float, ...] = (1e-30, 1e-10, 1.0, 1e10, 1e30)
) -> list[Tensor]:
    """A list of float32 tensors, some random, some constant, of very different sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors = []
    for _ in range(draw(st.integers(1, 5))):
        n = draw(st.sampled_from([1, 2, 3, 7, 16, 100, 1000, 70_000]))
        size = draw(st.sampled_from(sizes))
        kind = draw(st.sampled_from(["normal", "constant", "sparse"]))
        if kind == "constant":
            array = np.full(n, draw(st.floats(0.5, 2.0)))
        else:
            array = rng.standard_normal(n)
        if kind == "sparse":
            array[rng.random(n) < 0.9] = 0.0
        tensors.append(torch.from_numpy((array * size).astype(np.float32)))
    return tensors


def as_params(tensors: list[Tensor]) -> list[Any]:
    params = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
    for p, t in zip(params, tensors, strict=True):
        p.grad = t.clone()
    return params


def truth(tensors: list[Tensor], p: float = 2.0) -> float:
    """The norm in numpy's long double, whose sums numpy takes pairwise."""
    flat = np.abs(np.concatenate([t.numpy().reshape(-1) for t in tensors]).astype(np.longdouble))
    return float(np.sum(flat**p) ** (1 / np.longdouble(p)))


@many
@given(gradients())
def test_norm_is_the_true_one(tensors: list[Tensor]) -> None:
    expected = truth(tensors)
    norm = compileclip.get_total_norm(tensors).item()
    if expected == 0:
        assert norm == 0
    else:
        assert abs(norm - expected) <= 2e-7 * expected  # observed: 6e-8, half a unit


@many
@given(gradients(), st.sampled_from([0.5, 1.0, 1.5, 3.0, 6.0]))
def test_norm_of_any_order_is_the_true_one(tensors: list[Tensor], p: float) -> None:
    expected = truth(tensors, p)
    if 1e-37 < expected < 3e38:
        norm = compileclip.get_total_norm(tensors, p).item()
        assert abs(norm - expected) <= 2e-7 * expected  # observed: 6e-8


@many
@given(gradients(), st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_norm_after_clipping_is_at_most_max_norm(tensors: list[Tensor], max_norm: float) -> None:
    params = as_params(tensors)
    before = compileclip.clip_grad_norm_(params, max_norm).item()
    after = truth([p.grad for p in params])
    # The coefficient is rounded three times and each gradient once; observed: 1.2e-7.
    assert after <= max_norm * (1 + 4e-7)
    if before + 1e-6 < max_norm * (1 - 1e-6):
        assert all(torch.equal(p.grad, t) for p, t in zip(params, tensors, strict=True))


@many
@given(gradients(sizes=(1e-3, 1.0, 1e3)), st.floats(1e-2, 1e4))
def test_clipping_twice_is_clipping_once(tensors: list[Tensor], max_norm: float) -> None:
    params = as_params(tensors)
    compileclip.clip_grad_norm_(params, max_norm)
    once = [p.grad.clone() for p in params]
    compileclip.clip_grad_norm_(params, max_norm)
    for p, grad in zip(params, once, strict=True):
        # The second coefficient is 1 within the rounding of the norm and the epsilon of torch's
        # formula, 1e-6 / max_norm.
        torch.testing.assert_close(p.grad, grad, rtol=1e-6 + 1e-6 / max_norm, atol=0.0)


@many
@given(gradients(), st.randoms(use_true_random=False))
def test_norm_does_not_depend_on_order_or_shape(tensors: list[Tensor], random: Any) -> None:
    norm = compileclip.get_total_norm(tensors)
    shuffled = list(tensors)
    random.shuffle(shuffled)
    shuffled = [t.view(-1, 1) for t in shuffled]
    one = compileclip.get_total_norm(shuffled).item()
    assert math.isclose(norm.item(), one, rel_tol=1.2e-7)
    assert torch.equal(norm, compileclip.get_total_norm(tensors))  # and the same again
