"""State, gradients and hyperparameters that are odd, and that torch steps with all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from test_optim_db import all_params
from torch import Tensor, nn
from torch.optim import SGD
from twins import sgd

import compileclip


def torchs(make: Any, change: Any = None, **options: Any) -> compileclip.ClippedOptimizer:
    """Four steps of ``make(params)`` wrapped in mode auto, compared with bare ones."""
    params = params_like([(3, 4), (5,)])
    others = clone_params(params)
    ours, theirs = compileclip.wrap(make(params), 1.0, **options), make(others)
    for step in range(4):
        for opt, tensors in ((ours, params), (theirs, others)):
            set_grads(tensors, step)
            if change is not None:
                change(opt, step)
        ours.step()
        compileclip.clip_grad_norm_(others, 1.0)
        theirs.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # roots; observed: 6e-8
        for p, q in zip(params, others, strict=True):
            assert ours.state[p].keys() == theirs.state[q].keys()
    return ours


def test_a_momentum_that_is_none() -> None:
    """As a checkpoint of a step without momentum has it."""

    def forget(opt: Any, step: int) -> None:
        if step in (0, 2):
            for p in all_params(opt):
                opt.state[p]["momentum_buffer"] = None

    ours = torchs(sgd, forget)
    assert ours._modes.kernels is not None
    assert ours._modes.kernels.why_not is None


@pytest.mark.parametrize("which", ["betas", "lr"])
def test_hyperparameters_that_are_tensors(which: str) -> None:
    """A recorded operation takes them as numbers, or a program has tensors of one value."""
    options: dict[str, Any] = {
        "betas": {"lr": torch.tensor(0.1), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        "lr": {"lr": torch.tensor(0.1, requires_grad=True)},
    }
    ours = torchs(lambda p: torch.optim.Adam(p, foreach=False, **options[which]))
    assert ours._modes.kernels is not None
    assert ours._modes.kernels.why_not is None


def test_inference_mode() -> None:
    """State that is made there could be used nowhere else."""
    params = params_like([(3, 4), (5,)])
    set_grads(params, 0)
    opt = compileclip.wrap(torch.optim.Adam(params, lr=0.1), 1.0)
    with torch.inference_mode():
        opt.step()
    assert "inference_mode" in opt.explain()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch knows no such gradients")
def test_gradients_in_a_wider_dtype() -> None:
    def make(params: Any) -> Any:
        for p in params:
            p.data = p.data.bfloat16()
            p.grad_dtype = torch.float32
        return SGD(params, lr=0.1, foreach=False)

    params = params_like([(3, 4), (5,)])
    others = clone_params(params)
    ours, theirs = compileclip.wrap(make(params), 1.0), make(others)
    for step in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        ours.step()
        compileclip.clip_grad_norm_(others, 1.0)
        theirs.step()
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=2**-8, atol=0)


def test_step_counts_in_shared_memory() -> None:
    """They stay there, where other processes count as well."""
    params = params_like([(3, 4), (5,)])
    opt = torch.optim.Adam(params, foreach=False)
    for p in params:
        zeros = (torch.zeros_like(p).share_memory_() for _ in range(2))
        moments = dict(zip(("exp_avg", "exp_avg_sq"), zeros, strict=True))
        opt.state[p] = {"step": torch.tensor(0.0).share_memory_(), **moments}
    counts = [opt.state[p]["step"] for p in params]
    wrapped = compileclip.wrap(opt, 1.0)
    for step in range(2):
        set_grads(params, step)
        wrapped.step()
    assert [count.item() for count in counts] == [2.0, 2.0]
    assert "memory that processes share" in wrapped.explain()


@pytest.mark.parametrize("part", [slice(0, 4), slice(2, 6)], ids=["all of it", "a part"])
def test_two_gradients_in_the_same_memory(part: slice) -> None:
    """Both are written, so that one is scaled before the other or after it."""
    both = []
    for mode in ("auto", "eager"):
        params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
        opt = compileclip.wrap(SGD(params, lr=1.0), 1.0, write_grads=True, mode=mode)
        for step in range(3):
            memory = torch.arange(6.0) + step
            params[0].grad, params[1].grad = memory[:4], memory[part]
            if step == 0:
                params[1].grad = memory[part].clone()
            opt.step()
        both.append([*params, *(p.grad for p in params)])
    assert_same(*both, "parameter or gradient")


@pytest.mark.parametrize("cls", [torch.optim.Rprop, torch.optim.ASGD])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_first_step_that_does_not_count_makes_no_state(cls: Any, nonfinite: str) -> None:
    """The next one makes it, of its own learning rate."""
    both = []
    first = params_like([(3, 4), (5,)])
    for mode in ("auto", "eager"):
        params = clone_params(first)
        opt = compileclip.wrap(cls(params, lr=0.1), 1.0, nonfinite=nonfinite, mode=mode)
        for step in range(4):
            set_grads(params, step)
            opt.param_groups[0]["lr"] = 0.1 / (4 - step)
            if step == 0:
                params[0].grad[0, 0] = torch.inf  # type: ignore[index]
                if nonfinite == "raise":
                    with pytest.raises(RuntimeError, match="non-finite"):
                        opt.step()
                    assert not opt.state
                    continue
            opt.step()
        both.append(params)
    for p, q in zip(*both, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
