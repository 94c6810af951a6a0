"""mode="multi_tensor" where gradients, parameters or state change between steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from helpers import clone_params, params_like, set_grads
from test_optim_db import all_params
from twins import SHAPES, Twins, fresh

__all__ = ["fresh"]


def test_gradients_that_come_and_go_and_parameters_that_join() -> None:
    twins = Twins()

    def some(step: int) -> Callable[[int, Any], None]:
        def change(i: int, p: Any) -> None:
            if (i + step) % 3 == 0:
                p.grad = None

        return change

    for step in range(4):
        twins.step(step, change=some(step))
    extra = params_like([(9,)])
    for opt, params in zip(twins.both, (extra, clone_params(extra)), strict=True):
        opt.add_param_group({"params": params, "lr": 0.3})
    for step in range(4, 8):
        twins.step(step)
    for opt in twins.both:
        all_params(opt)[0].requires_grad_(False)
    for step in range(8, 10):
        twins.step(step, change=lambda i, p: setattr(p, "grad", None) if i == 0 else None)


def test_state_whose_memory_is_another() -> None:
    """The tensors are the same: nothing but their addresses tells."""
    twins = Twins()
    for step in range(3):
        twins.step(step)
    for opt in twins.both:
        p = all_params(opt)[1]
        opt.state[p]["momentum_buffer"].data = torch.zeros(p.shape)
    for step in range(3, 5):
        twins.step(step)


def test_state_that_is_loaded_replaced_or_moved() -> None:
    twins = Twins()
    twins.step(0)
    saved = [io.BytesIO(), io.BytesIO()]
    for opt, file in zip(twins.both, saved, strict=True):
        torch.save(opt.state_dict(), file)
        file.seek(0)
    twins.step(1)
    for opt, file in zip(twins.both, saved, strict=True):
        opt.load_state_dict(torch.load(file, weights_only=True))
    twins.step(2)
    for opt in twins.both:
        p = all_params(opt)[0]
        opt.state[p]["momentum_buffer"] = torch.ones_like(p)
        q = all_params(opt)[1]
        opt.state[q]["momentum_buffer"].data = torch.zeros(5)
        r = all_params(opt)[2]
        opt.state[r]["momentum_buffer"].fill_(0.5)
    twins.step(3)
    for opt in twins.both:
        p = all_params(opt)[3]
        p.data = p.data.clone()  # other memory
        opt.state.clear()
    twins.step(4)


def test_a_gradient_that_comes_late() -> None:
    twins = Twins(shapes=[(4,), (5,)])
    for step in range(4):
        twins.step(step, change=lambda i, p: setattr(p, "grad", None) if i == 1 else None)
    before = all_params(twins.ours)[1].detach().clone()
    twins.step(4)
    assert not torch.equal(all_params(twins.ours)[1], before)


def test_step_counts_that_the_user_changes() -> None:
    twins = Twins(lambda params: torch.optim.NAdam(params, lr=0.1, foreach=False))
    for seed in range(3):
        for opt in twins.both:
            set_grads(all_params(opt), seed)
            opt.step()
    for opt in twins.both:
        for state in opt.state.values():
            state["step"].fill_(10.0)
        first = opt.state[all_params(opt)[0]]
        first["step"].fill_(20.0)  # of one alone
    for seed in range(3, 6):
        for opt in twins.both:
            set_grads(all_params(opt), seed)
            opt.step()
    steps = [[s["step"].item() for s in opt.state.values()] for opt in twins.both]
    assert steps[0] == steps[1] == [23.0, *[13.0] * (len(SHAPES) - 1)]
    for p, q in twins.params():
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # observed: 6e-8


def test_copies_and_checkpoints() -> None:
    twins = Twins(lambda params: torch.optim.Adamax(params, lr=0.1, foreach=False))
    twins.step(0)
    twins.ours = copy.deepcopy(twins.ours)
    twins.step(1)
    twins.ours = pickle.loads(pickle.dumps(twins.ours))
    twins.step(2)
    file = io.BytesIO()
    torch.save(twins.ours.state_dict(), file)
    file.seek(0)
    twins.ours.load_state_dict(torch.load(file, weights_only=True))
    twins.step(3)
