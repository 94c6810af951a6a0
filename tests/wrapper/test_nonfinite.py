"""What a NaN or infinite norm does, in its three forms."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer, params_like, set_grads
from optimizer_registry import makers
from torch import Tensor
from torch.optim import Optimizer

import compileclip
from compileclip.eager import eager_step

FUSED = makers(["AdamW", "Adam, amsgrad", "SGD, momentum", "SGD", "Adagrad"], lr=0.1, fused=True)
OPTIMIZERS = {
    **makers(["AdamW", "SGD, momentum", "Muon"], lr=0.1),
    **makers(["RMSprop"], lr=0.1, foreach=True),
    **FUSED,
}


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    params = params_like([(3, 3), (4, 2)])
    return compileclip.wrap(OPTIMIZERS[name](params), 1.0, mode="eager", **options)


def params_of(opt: Optimizer) -> list[Any]:
    return [p for g in opt.param_groups for p in g["params"]]


def give(opt: Optimizer, step: int, bad: float | None = None) -> list[Tensor]:
    set_grads(params_of(opt), step, scale=3)
    if bad is not None:
        params_of(opt)[1].grad[0, 0] = bad
    return [p.grad.clone() for p in params_of(opt)]


@pytest.fixture(params=["on the host", "on the device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's fused kernels honour found_inf as a GPU's do, so they can stand for them."""
    if request.param == "on the device":
        monkeypatch.setattr(eager_step, "_is_asynchronous", lambda device: True)
    return str(request.param)


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip(name: str, bad_step: int, bad: float, write_grads: bool | None, where: str) -> None:
    """Parameters, state and step counts as before, and the run goes on as if nothing had been."""
    ours = make(name, nonfinite="skip", write_grads=write_grads)
    theirs = make(name, write_grads=write_grads)
    for step in range(4):
        if step == bad_step:
            before = copy.deepcopy(ours)
            grads = give(ours, 100, bad)
            ours.step()
            assert not ours.total_norm.isfinite()
            assert_same_optimizer(ours, before)
            assert_same([p.grad for p in params_of(ours)], grads, "gradient of a skipped step")
        give(ours, step)
        give(theirs, step)
        ours.step()
        theirs.step()
        assert_same_optimizer(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
def test_skip_on_the_device_does_not_read_the_norm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step, which makes the state, nothing waits for the norm."""
    monkeypatch.setattr(eager_step, "_is_asynchronous", lambda device: True)
    opt = make(name, nonfinite="skip")
    give(opt, 0)
    opt.step()

    def read(tensor: Tensor) -> Any:
        raise AssertionError("the norm was read")

    monkeypatch.setattr(Tensor, "__bool__", read)
    monkeypatch.setattr(Tensor, "item", read)
    give(opt, 1, math.nan)
    opt.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_raise(name: str, bad_step: int, bad: float) -> None:
    ours, theirs = make(name, nonfinite="raise"), make(name)
    for step in range(3):
        if step == bad_step:
            before = copy.deepcopy(ours)
            grads = give(ours, 100, bad)
            with pytest.raises(
                RuntimeError, match=r"non-finite \((nan|inf)\).*Nothing was changed"
            ):
                ours.step()
            assert_same_optimizer(ours, before)
            assert_same([p.grad for p in params_of(ours)], grads, "gradient")
            assert not ours.total_norm.isfinite()
        give(ours, step)
        give(theirs, step)
        ours.step()
        theirs.step()
        assert_same_optimizer(ours, theirs)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_propagate_does_what_torch_does(name: str, bad: float) -> None:
    ours, theirs = make(name), make(name).optimizer
    give(ours, 0, bad)
    give(theirs, 0, bad)
    torch.nn.utils.clip_grad_norm_(params_of(theirs), 1.0)
    ours.step()
    theirs.step()
    # Adam keeps NaN where a gradient is NaN; an infinite norm makes the other gradients 0.
    assert_same(params_of(ours), params_of(theirs), "parameter")


@pytest.mark.parametrize("max_norm", [None, math.inf])
def test_skip_without_clipping(max_norm: float | None) -> None:
    opt = make("AdamW", nonfinite="skip")
    opt.max_norm = max_norm
    before = copy.deepcopy(opt)
    give(opt, 0, math.nan)
    opt.step()
    assert_same_optimizer(opt, before)
