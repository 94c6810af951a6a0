"""``compileclip.clipped``: classes of optimizers that clip."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer, clone_params, params_like, set_grads
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

import compileclip
from compileclip import clipped


class Own(AdamW):
    """A user's class, with a constructor of its own."""

    def __init__(self, params: Any, *, rate: float = 0.1) -> None:
        super().__init__(params, lr=rate)


def steps(opt: Optimizer, count: int = 4, first: int = 0) -> Optimizer:
    for seed in range(first, first + count):
        set_grads([p for g in opt.param_groups for p in g["params"]], seed, scale=3)
        opt.step()
    return opt


@pytest.mark.parametrize("cls", [AdamW, SGD, Own])
def test_an_instance_is_what_wrap_makes(cls: type[Optimizer]) -> None:
    params = params_like([(4, 3), (3,)])
    others = clone_params(params)
    options = {"norm_type": 1.0, "nonfinite": "skip", "write_grads": True, "mode": "eager"}
    ours = clipped(cls, 0.5, **options)(params)
    theirs = compileclip.wrap(cls(others), 0.5, **options)
    for opt in (ours, theirs):
        steps(opt)
    assert_same_optimizer(ours, theirs)
    assert_same([ours.total_norm], [theirs.total_norm], "norm")
    assert type(ours.optimizer) is cls
    assert isinstance(ours, compileclip.ClippedOptimizer)
    assert ours._settings == theirs._settings
    assert repr(ours).startswith(f"Clipped{cls.__name__} (max_norm=0.5, norm_type=1.0")


def test_the_same_arguments_give_the_same_class() -> None:
    cls = clipped(AdamW, max_norm=1.0)
    assert clipped(AdamW, 1) is cls
    assert clipped(AdamW, 1.0, norm_type=2, mode="auto") is cls
    assert clipped(AdamW, 2.0) is not cls
    assert clipped(SGD, 1.0) is not cls
    assert cls.__name__ == "ClippedAdamW"
    assert "torch.optim.adamw.AdamW" in str(cls.__doc__)


@pytest.mark.parametrize("cls", [AdamW, SGD, Own])
def test_the_signature_is_that_of_the_class(cls: type[Optimizer]) -> None:
    made = clipped(cls, 1.0)
    assert inspect.signature(made) == inspect.signature(cls)
    names = list(inspect.signature(made.__init__).parameters)
    assert names == list(inspect.signature(cls.__init__).parameters)
    with pytest.raises(TypeError, match="no_such"):
        made(params_like([(3,)]), no_such=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_class_is_pickled(protocol: int) -> None:
    cls = clipped(Own, 0.5, nonfinite="skip")
    assert pickle.loads(pickle.dumps(cls, protocol)) is cls
    assert copy.deepcopy(cls) is cls
    assert copy.copy(cls) is cls


def test_a_class_is_made_anew_in_another_process() -> None:
    cls = clipped(AdamW, 0.5, nonfinite="skip")
    opt = steps(cls(params_like([(4, 3)])))
    code = (
        "import pickle, sys; cls, opt = pickle.load(sys.stdin.buffer)\n"
        "import torch, compileclip\n"
        "assert cls is compileclip.clipped(torch.optim.AdamW, 0.5, nonfinite='skip')\n"
        "assert type(opt) is cls; opt.step(); print(opt.nonfinite, opt.total_norm.item())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=pickle.dumps((cls, opt)), capture_output=True, check=True)
    assert done.stdout.split()[0] == b"skip"


def _pickled(opt: Any) -> Any:
    return pickle.loads(pickle.dumps(opt))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_an_instance_is_copied(copied: Any) -> None:
    opt = steps(clipped(AdamW, 0.5)(params_like([(4, 3), (3,)]), lr=0.1))
    other = copied(opt)
    assert type(other) is type(opt)
    assert other.max_norm == 0.5
    assert_same([other.total_norm], [opt.total_norm], "norm")
    for each in (opt, other):
        steps(each, first=4)
    assert_same_optimizer(other, opt)


def test_checkpoints_move_to_and_from_the_bare_optimizer() -> None:
    params = params_like([(4, 3), (3,)])
    ours = steps(clipped(AdamW, 0.5)(params, lr=0.1))
    bare = AdamW(clone_params(params))
    bare.load_state_dict(copy.deepcopy(ours.state_dict()))
    again = clipped(AdamW, 0.5)(clone_params(params))
    again.load_state_dict(bare.state_dict())
    for opt in (ours, again):
        steps(opt, first=4)
    assert_same_optimizer(again, ours)


def test_a_scheduler() -> None:
    opt = clipped(SGD, 0.5)(params_like([(3,)]), lr=0.1)
    scheduler = lr_scheduler.StepLR(opt, 1, gamma=0.5)
    steps(opt, 1)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_groups_and_max_norm() -> None:
    a, b = params_like([(3,), (4,)])
    opt: Any = clipped(SGD, 0.5)([{"params": [a], "lr": 1.0}, {"params": [b]}], lr=0.1)
    assert [g["lr"] for g in opt.param_groups] == [1.0, 0.1]
    opt.max_norm = 0.25
    assert opt.max_norm == 0.25
    assert clipped(SGD, 0.5)([a]).max_norm == 0.5


def test_bad_arguments() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    for wrong in (inner, torch.nn.Linear, "AdamW", lambda params: inner):
        with pytest.raises(TypeError, match="clipped\\(\\) takes a class"):
            clipped(wrong, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ClippedSGD clips already"):
        clipped(clipped(SGD, 1.0), 1.0)
    with pytest.raises(ValueError, match="needs a closure"):
        clipped(torch.optim.LBFGS, 1.0)
    with pytest.raises(ValueError, match=r"max_norm=-1\.0"):
        clipped(SGD, -1.0)


def test_a_training_step_in_one_graph() -> None:
    """Dynamo takes a class of a metaclass of ours as any other."""
    runs = []
    for made in (clipped(AdamW, 0.5), lambda p, **o: compileclip.wrap(AdamW(p, **o), 0.5)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        opt = made(model.parameters(), lr=0.1)

        def train_step(x: Any, model: Any = model, opt: Any = opt) -> Any:
            loss = model(x).square().sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        compiled = torch.compile(train_step, backend="aot_eager")
        runs.append([compiled(torch.full((2, 4), float(i + 1))) for i in range(3)])
    assert_same(*runs, "loss")
