"""Faults that somebody found who read README and tried what came to mind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from torch import nn

import compileclip

SHAPES = [(3, 4), (5,), (2, 3)]


@pytest.mark.parametrize("mode", ["eager", "auto"])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("foreach", [True, False, None])
def test_gradients_that_a_step_of_torchs_writes(
    mode: str, max_norm: float | None, foreach: bool | None
) -> None:
    """Torch's foreach kernels add momentum to the gradients, where it is Nesterov's."""
    params = [*params_like(SHAPES), nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    others = clone_params(params)
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    sgd = torch.optim.SGD(params, foreach=foreach, **kwargs)
    opt = compileclip.wrap(sgd, max_norm, write_grads=False, mode=mode)
    plain = torch.optim.SGD(others, foreach=False, **kwargs)
    for step in range(3):
        for both in zip(params, others, strict=True):
            torch.manual_seed(step)
            for p in both:
                p.grad = torch.ones_like(p) * (step + 1)
        before = [p.grad for p in params]
        copies = [g.clone() for g in before if g is not None]
        opt.step()
        assert all(p.grad is g for p, g in zip(params, before, strict=True))
        assert_same([p.grad for p in params], copies, "gradient")
        if max_norm is not None:
            compileclip.clip_grad_norm_(others, max_norm)
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "SGD with a number", "Adam"])
def test_state_is_what_it_would_be_unwrapped(kind: str) -> None:
    def made(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "Adam":
            return torch.optim.Adam(params)
        return torch.optim.SGD(params, lr=0.1, maximize=kind != "SGD")

    params = params_like(SHAPES)
    others = clone_params(params)
    opt, plain = compileclip.wrap(made(params), 1e9), made(others)
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        opt.step()
        plain.step()
        mine, theirs = (o.state_dict()["state"] for o in (opt, plain))
        assert {k: sorted(v) for k, v in mine.items()} == {k: sorted(v) for k, v in theirs.items()}
    assert compileclip.wrap(made(params), 1.0).state_dict()["state"] == {}
    if kind == "SGD":
        opt.param_groups[0]["params"].pop()
        opt.state_dict()  # holds nothing of a parameter that is gone


def test_an_error_leaves_no_state_of_parameters_that_are_not_served() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    opt = compileclip.wrap(torch.optim.Adam([p]), 1.0)
    for _ in range(3):
        p.grad = torch.ones(4, 3).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            opt.step()
        assert opt.state_dict()["state"] == {}
    p.grad = torch.ones(4, 3)
    opt.step()
    assert opt.state[p]["step"] == 1


def test_a_norm_that_is_no_tensor() -> None:
    params = params_like(SHAPES)
    set_grads(params, 0)
    with pytest.raises(TypeError):
        compileclip.clip_grads_with_norm_(params, 1.0, 3.0)  # type: ignore[arg-type]


IN_PLACE: dict[str, Any] = {
    "transposed": lambda t: t.t_(),
    "fewer": lambda t: t.resize_(2),
    "other sizes": lambda t: t.resize_(2, 18),
    "other strides": lambda t: t.as_strided_((6, 6), (1, 6)),
    "a part": lambda t: t.set_(t.data[:1]),
}


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_state_whose_layout_is_changed_in_place(change: str, name: str) -> None:
    """It is where it was, but holds other elements: eager mode's result, or torch's error."""
    found: list[Any] = []
    for mode in ("auto", "eager"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 6))
        opt = compileclip.wrap(torch.optim.AdamW([p], lr=0.1, foreach=False), 1.0, mode=mode)
        for _ in range(6):
            p.grad = torch.randn(6, 6)
            opt.step()
        IN_PLACE[change](opt.state[p][name])
        p.grad = torch.randn(6, 6)
        try:
            opt.step()
        except RuntimeError as error:
            found.append(type(error))
        else:
            found.append(p)
    assert type(found[0]) is type(found[1])
    if isinstance(found[0], torch.Tensor):
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("mode", ["eager", "auto"])
def test_a_gradient_of_two_parameters_is_clipped_once(
    mode: str, write_grads: bool | None, fused: bool
) -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    sgd = torch.optim.SGD(params, lr=1.0, fused=fused)
    opt = compileclip.wrap(sgd, 1.0, write_grads=write_grads, mode=mode)
    for step in range(1, 4):
        params[0].grad = params[1].grad = torch.full((3,), 4.0)
        opt.step()
        expected = torch.full((3,), -4.0 * step / (4.0 * 6**0.5 + 1e-6))
        for p in params:
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("write_grads", [None, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_of_a_parameter_that_is_served_and_of_one_that_is_not(
    write_grads: bool | None, fused: bool
) -> None:
    """Eager mode steps first, with the one that has gaps in memory."""
    params = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(8)[::2])]
    sgd = torch.optim.SGD(params, lr=1.0, fused=fused)
    opt = compileclip.wrap(sgd, 1.0, write_grads=write_grads)
    for step in range(1, 5):
        params[0].grad = params[1].grad = torch.full((4,), 4.0)
        opt.step()
        expected = torch.full((4,), -4.0 * step / (4.0 * 8**0.5 + 1e-6))
        for p in params:
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
    assert opt._modes.kernels is not None
    assert len(opt._modes.kernels.refused) == 1
