"""compileclip.clipped: a class that frameworks make the optimizer of."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from helpers import assert_same_optimizer, clone_params, params_like, set_grads
from test_optim_db import all_params
from torch.optim import SGD, AdamW

import compileclip
from compileclip import ClippedOptimizer, clipped


def test_it_is_a_wrapped_optimizer() -> None:
    params = params_like([(3, 4), (5,)])
    made = clipped(SGD, 0.5, nonfinite="skip")(params, lr=0.1, momentum=0.9)
    wrapped = compileclip.wrap(
        SGD(clone_params(params), lr=0.1, momentum=0.9), 0.5, nonfinite="skip"
    )
    assert isinstance(made, ClippedOptimizer)
    assert isinstance(made, torch.optim.Optimizer)
    for seed in range(3):
        for opt in (made, wrapped):
            set_grads(all_params(opt), seed)
            opt.step()
        assert_same_optimizer(made, wrapped)
    assert (made.max_norm, made.nonfinite, made.mode) == (0.5, "skip", "auto")
    torch.optim.lr_scheduler.StepLR(made, 1).step()
    assert made.param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_class() -> None:
    made = clipped(AdamW, 1.0)
    assert made is clipped(AdamW, max_norm=1)
    assert made is not clipped(AdamW, 2.0)
    assert made.__name__ == "ClippedAdamW"
    assert inspect.signature(made) == inspect.signature(AdamW)
    assert pickle.loads(pickle.dumps(made)) is made
    assert copy.deepcopy(made) is made


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_an_instance(copied: object) -> None:
    opt = clipped(AdamW, 0.1)(params_like([(3,)]), lr=0.1)
    set_grads(all_params(opt), 0)
    opt.step()
    other = copied(opt)  # type: ignore[operator]
    assert type(other) is type(opt)
    for each in (opt, other):
        set_grads(all_params(each), 1)
        each.step()
    assert_same_optimizer(opt, other)
    fresh = clipped(AdamW, 0.1)(params_like([(3,)]), lr=0.2)
    fresh.load_state_dict(opt.state_dict())
    assert fresh.param_groups[0]["lr"] == 0.1


def test_what_is_no_class() -> None:
    opt = SGD(params_like([(3,)]), lr=0.1)
    for wrong in (opt, torch.nn.Linear, "SGD"):
        with pytest.raises(TypeError, match="takes a class of optimizers"):
            clipped(wrong, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no bound of a norm"):
        clipped(SGD, -1.0)
