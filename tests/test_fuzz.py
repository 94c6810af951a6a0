"""mode="multi_tensor" against eager in random cases: shapes, strides, dtypes, groups, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, flat_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_optim_db import all_params
from torch import Tensor, nn
from torch.optim import SGD, Adamax, Optimizer, Rprop

import compileclip

# Without a square root, whose last bit ATen rounds otherwise; all else is equal to the bit. In
# float32 and float64 that holds for tensors of every size.
MAKERS: list[Any] = [
    lambda params, wd: SGD(params, lr=0.1, momentum=0.9, weight_decay=wd, foreach=False),
    lambda params, wd: SGD(params, lr=0.1, weight_decay=wd, maximize=True, foreach=False),
    lambda params, wd: Adamax(params, lr=0.1, weight_decay=wd, foreach=False),
    lambda params, wd: Rprop(params, lr=0.1, foreach=False),
]
DTYPES = [torch.float32, torch.float64]
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple) | st.sampled_from(
    [(16383,), (16384,), (16385,), (130, 127), (3, 16384)]
)
layouts = st.sampled_from(["plain", "transposed", "strided", "misaligned", "expanded", "none"])


def laid_out(grad: Tensor, layout: str) -> Tensor | None:
    if layout == "none":
        return None
    if layout == "transposed" and grad.dim() > 1:
        return grad.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([grad, grad], -1)[..., 0]
    if layout == "misaligned":
        return torch.cat([grad.new_zeros(1), grad.reshape(-1)])[1:].view_as(grad)
    if layout == "expanded" and grad.dim() > 0 and grad.numel():
        return grad[:1].expand_as(grad)
    return grad


class Case:
    """A model's worth of parameters in two groups, the same for both optimizers."""

    def __init__(self, data: st.DataObject) -> None:
        drawn = data.draw(
            st.lists(
                st.tuples(shapes, st.sampled_from(DTYPES), st.booleans()), min_size=1, max_size=6
            )
        )
        self.seed = data.draw(st.integers(0, 1000))
        generator = torch.Generator().manual_seed(self.seed)
        self.values = []
        for shape, dtype, transposed in drawn:
            value = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
            self.values.append(
                value.mT.contiguous().mT if transposed and value.dim() > 1 else value
            )
        self.split = data.draw(st.integers(0, len(drawn)))
        self.make = data.draw(st.sampled_from(MAKERS))

    def optimizer(self) -> Optimizer:
        params = [nn.Parameter(v.clone()) for v in self.values]
        groups = [
            {"params": params[: self.split], "lr": 0.2},
            {"params": params[self.split :]},
        ]
        made: Optimizer = self.make(groups, 0.01)
        return made


def fuzz(examples: int) -> Any:
    health = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=health
    )


@fuzz(300)
@given(data=st.data())
def test_random_steps(data: st.DataObject) -> None:
    check(data)


@pytest.mark.sweep
@fuzz(3000)
@given(data=st.data())
def test_more_random_steps(data: st.DataObject) -> None:
    check(data)


def check(data: st.DataObject) -> None:
    case = Case(data)
    write_grads = data.draw(st.sampled_from([None, True, False]))
    ours = compileclip.wrap(case.optimizer(), 1.0, mode="multi_tensor", write_grads=write_grads)
    theirs = compileclip.wrap(case.optimizer(), 1.0, mode="eager", write_grads=bool(write_grads))
    for step in range(data.draw(st.integers(1, 4))):
        chosen = data.draw(st.lists(layouts, min_size=len(case.values), max_size=len(case.values)))
        for opt in (ours, theirs):
            generator = torch.Generator().manual_seed(case.seed + step)
            opt.max_norm = 0.5 if step % 2 else 1e9
            for p, layout in zip(all_params(opt), chosen, strict=True):
                grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)
                p.grad = laid_out(grad, layout)
        before = [None if p.grad is None else p.grad.clone() for p in all_params(ours)]
        ours.step()
        theirs.step()
        assert torch.equal(ours.total_norm, theirs.total_norm)
        assert_same(all_params(ours), all_params(theirs), "parameter")
        mine, other = flat_state(ours), flat_state(theirs)
        assert [name for name, _ in mine] == [name for name, _ in other]
        assert_same([v for _, v in mine], [v for _, v in other], "state")
        grads = [p.grad for p in all_params(ours)]
        if write_grads is False:
            assert_same(grads, before, "gradient")
        elif write_grads:
            assert_same(grads, [p.grad for p in all_params(theirs)], "gradient")
