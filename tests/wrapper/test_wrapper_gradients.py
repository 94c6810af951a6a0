"""What a step of ClippedOptimizer does to gradients: copied, put back, shared, missing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same, params_like, set_grads
from torch.optim import SGD
from wrapper_cases import both, grads_of, wrapped_sgd

import compileclip
from compileclip.eager import reference, unhooked_step

__all__ = ["both"]


def test_no_gradient_at_all() -> None:
    opt = wrapped_sgd(nonfinite="raise")
    before = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    opt.zero_grad()
    opt.step()
    assert opt.total_norm.item() == 0.0
    assert_same([p for g in opt.param_groups for p in g["params"]], before, "parameter")


def test_copies_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """write_grads=False never holds a second copy of all gradients."""
    monkeypatch.setattr(unhooked_step, "COPY_BYTES", 4000)
    params = params_like([(10, 10), (1000,), (2000,), (500,), (500,), (3,)])
    set_grads(params, seed=0)
    opt = compileclip.wrap(SGD(params, lr=0.1), 0.5, write_grads=False, mode="eager")
    held: list[int] = []

    def watch(self: Any) -> None:
        held.append(sum(p.grad.nbytes for p in params if p.grad is not None))
        step.__wrapped__(self)

    step = SGD.step
    monkeypatch.setattr(SGD, "step", watch)
    watch.__module__ = "torch.optim.sgd"
    expected = [
        p.detach() - 0.1 * p.grad * reference.clip_coef(0.5, n)
        for n in [compileclip.get_total_norm([p.grad for p in params])]
        for p in params
    ]
    grads = [p.grad for p in params]
    opt.step()
    assert held == [400, 4000, 8000, 4000, 12]
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e)


def test_gradients_come_back_when_the_step_fails() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> None:
            raise OSError("broken")

    params = params_like([(3, 3)])
    set_grads(params, seed=0)
    grads = grads_of(opt := compileclip.wrap(Broken(params), 0.1, write_grads=False))
    with pytest.raises(OSError, match="broken"):
        opt.step()
    assert_same(grads_of(opt), grads, "gradient")


def test_expanded_and_shared_gradients() -> None:
    """An expanded gradient cannot be written in place; a shared one is scaled once."""
    a, b, c = params_like([(4, 3), (5,), (5,)])
    a.grad = torch.ones(1, 3).expand(4, 3)
    b.grad = c.grad = torch.ones(5)
    opt = compileclip.wrap(SGD([a, b, c], lr=1.0), 1.0, write_grads=True)
    opt.step()
    coef = 1.0 / (math.sqrt(22.0) + 1e-6)
    assert opt.total_norm.item() == pytest.approx(math.sqrt(22.0), rel=1e-7)
    for p in (a, b, c):
        torch.testing.assert_close(p.grad, torch.full_like(p, coef))


def test_a_parameter_listed_twice_counts_once() -> None:
    (p,) = params_like([(4,)])
    p.grad = torch.ones(4)
    with pytest.warns(UserWarning, match="duplicate"):
        inner = SGD([p, p], lr=0.1)
    opt = compileclip.wrap(inner, 1.0, write_grads=True)
    opt.step()
    assert opt.total_norm == 2.0
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))


@pytest.mark.parametrize("mode", ["eager", "multi_tensor"])
def test_a_gradient_that_is_written_can_be_written_again(mode: str) -> None:
    """Found by fuzzing: an expanded one that was not clipped was left as it was."""
    param = torch.nn.Parameter(torch.zeros(3, 4))
    opt = compileclip.wrap(SGD([param], lr=0.1), max_norm=1e3, write_grads=True, mode=mode)
    param.grad = torch.ones(1, 4).expand(3, 4)
    opt.step()
    param.grad.mul_(2)
    assert (param.grad == 2).all()


@pytest.mark.parametrize("write_grads", [None, True])
@pytest.mark.parametrize("mode", ["eager", "inductor", "multi_tensor"])
def test_a_backward_through_what_the_step_has_changed(mode: str, write_grads: bool | None) -> None:
    """It fails, as after torch's own step, and does not take new weights for the old."""
    weight = torch.nn.Parameter(torch.ones(3))
    opt = compileclip.wrap(SGD([weight], lr=0.1), 1.0, write_grads=write_grads, mode=mode)
    for _ in range(2):
        loss = (weight * torch.ones(3, requires_grad=True)).sum()
        loss.backward(retain_graph=True)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        opt.zero_grad()


@pytest.mark.parametrize("mode", ["eager", "multi_tensor"])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_a_backward_through_a_gradient_that_is_written(mode: str, max_norm: float) -> None:
    """It fails where the gradient was scaled, as after ``clip_grad_norm_``."""
    param = torch.nn.Parameter(torch.ones(3))
    opt = compileclip.wrap(SGD([param], lr=0.1), max_norm, write_grads=True, mode=mode)
    for _ in range(2):
        param.grad = torch.ones(3)
        product = param.grad * torch.ones(3, requires_grad=True)
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
