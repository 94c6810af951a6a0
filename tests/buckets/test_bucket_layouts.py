"""mode="multi_tensor" where gradients, parameters or state are laid out unusually."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from test_optim_db import all_params
from torch import Tensor, nn
from twins import Twins, fresh, sgd

import compileclip

__all__ = ["fresh"]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda g: g.t().contiguous().t(),
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "strided": lambda g: torch.stack([g, g], -1)[..., 0],
    "misaligned": lambda g: torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view_as(g),
    "flipped strides": lambda g: torch.empty_strided(g.shape, (1, g.shape[0])).copy_(g),
}


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(layout: str, write_grads: bool | None) -> None:
    twins = Twins(shapes=[(6, 4), (33, 700), (1, 1)], write_grads=write_grads)

    def change(i: int, p: Any) -> None:
        p.grad = LAYOUTS[layout](p.grad)

    for seed in range(4):
        twins.step(seed, change=change if seed != 2 else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_has_the_bits_of_eager(dtype: torch.dtype) -> None:
    """Over several chunks, whose sums could be added in another order; found by fuzzing."""
    for make in (lambda g: g, lambda g: g.t().contiguous().t(), lambda g: g[:1].expand_as(g)):
        params = [nn.Parameter(torch.zeros(130, 400, dtype=dtype)) for _ in range(2)]
        grad = make(torch.randn(130, 400, dtype=torch.float64).to(dtype))
        norms = []
        for p, mode in zip(params, ("multi_tensor", "eager"), strict=True):
            opt = compileclip.wrap(sgd([p]), 1.0, mode=mode)
            p.grad = grad.clone()
            opt.step()
            norms.append(opt.total_norm)
        assert_same(norms[:1], norms[1:], "norm")


def test_layouts_of_parameters() -> None:
    twins = Twins(shapes=[(2, 3, 4, 4), (8, 4)])
    for seed in range(3):
        twins.step(seed)
    for opt in twins.both:  # as model.to(memory_format=...) does, in the midst of training
        p, q = all_params(opt)
        p.data = p.data.to(memory_format=torch.channels_last)
        q.data = q.data.t().contiguous().t()
    for seed in range(3, 6):
        twins.step(seed, served=False)  # the state keeps its layout, so they are not served
    assert twins.ours._modes.kernels.why_not is not None
    fresh = Twins(shapes=[(2, 3, 4, 4)])
    for opt in fresh.both:
        (p,) = all_params(opt)
        p.data = p.data.to(memory_format=torch.channels_last)
    for seed in range(3):
        fresh.step(seed)


def test_state_of_another_layout() -> None:
    twins = Twins(shapes=[(4, 4), (5,)])
    twins.step(0)
    twins.step(1)
    for opt in twins.both:
        state = opt.state[all_params(opt)[0]]
        values = torch.arange(16.0).reshape(4, 4)
        state["momentum_buffer"] = torch.empty_strided((4, 4), (1, 4)).copy_(values)
    twins.step(2, served=False)
    twins.step(3, served=False)
