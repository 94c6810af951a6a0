"""Steps that need a closure, or call it again: refused with a remedy before anything changes."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from closure_optimizers import (
    ASKING,
    AsTorchs,
    BringsItsOwn,
    ByTwoWays,
    Needs,
    Refuses,
    Tries,
    closure_of,
)
from helpers import assert_same, clone_params, params_like
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

import compileclip
from compileclip.custom_optimizers.closure_calls import what_a_step_asks_for


@pytest.mark.parametrize("cls", ASKING)
def test_refused_when_wrapped(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}.step {ASKING[cls]}.*inside the closure"):
        compileclip.wrap(cls(params_like([(3,)])), 1.0)
    with pytest.raises(ValueError, match=f"{cls.__name__}.step {ASKING[cls]}"):
        compileclip.clipped(cls, 1.0)


def test_the_remedy_that_is_named() -> None:
    (p,) = params_like([(3,)])
    opt = Needs([p])
    closure = closure_of(opt)
    norms = []

    def clips() -> Tensor:
        loss = closure()
        norms.append(compileclip.clip_grad_norm_([p], 0.5))
        return loss

    before = p.detach().clone()
    opt.step(clips)
    assert norms[0] > 0.5
    torch.testing.assert_close((p - before).norm(), torch.tensor(0.05))


@pytest.mark.parametrize("cls", [SGD, Adam, AsTorchs, ByTwoWays, BringsItsOwn, Tries])
def test_others_are_wrapped(cls: Any) -> None:
    ours = params_like([(3,)])
    theirs = clone_params(ours)
    opt, bare = compileclip.wrap(cls(ours), 1e9, mode="eager"), cls(theirs)
    for _ in range(3):
        assert opt.step(closure_of(opt)) == bare.step(closure_of(bare))
    assert_same(ours, theirs, "parameter")


def test_a_step_that_always_fails_says_so_itself() -> None:
    (p,) = params_like([(3,)])
    opt = compileclip.wrap(Refuses([p]), 1.0)
    with pytest.raises(NotImplementedError, match="call fused_backward"):
        opt.step(closure_of(opt))


class TakesMore(SGD):
    """Takes the loss."""

    def step(self, closure: Any = None, *, loss: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_a_step_that_takes_more_than_a_closure() -> None:
    with pytest.raises(ValueError, match=r"TakesMore.step takes loss besides.*before the step"):
        compileclip.wrap(TakesMore(params_like([(3,)]), lr=0.1), 1.0)


def without_a_source(complains: bool) -> Any:
    """A class whose source cannot be read."""
    names: dict[str, Any] = {"SGD": SGD}
    lines = [
        "class Sourceless(SGD):",
        "    def step(self, closure=None):",
        "        if closure is None: raise ValueError('no closure')" if complains else "",
        "        loss = closure()",
        "        super().step()",
    ]
    exec("\n".join(lines), names)
    return names["Sourceless"]


@pytest.mark.parametrize("complains", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_what_cannot_be_read_is_found_in_the_first_step(
    mode: str, given: bool, complains: bool
) -> None:
    params = params_like([(3,)])
    opt = compileclip.wrap(without_a_source(complains)(params, lr=0.1), 1.0, mode=mode)
    before, closure = params[0].detach().clone(), closure_of(opt)
    if not given:
        closure()
    with pytest.raises(RuntimeError, match=r"the step of Sourceless asks for its closure.*bare"):
        opt.step(closure if given else None)
    assert_same([*params], [before], "parameter")
    assert len(opt.state) == 0


class Broken(SGD):
    """Fails by something else."""

    hook: Any = None

    def step(self, closure: Any = None) -> Any:
        return self.broken()

    def broken(self) -> Any:
        return self.hook()


def test_another_error_is_left_alone() -> None:
    opt = compileclip.wrap(Broken(params_like([(3,)]), lr=0.1), 1.0, mode="eager")
    closure_of(opt)()
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        opt.step()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("pytorch_optimizer", "AliG BSAM FriendlySAM GSAM LookSAM SAM WSAM"),
        (
            "schedulefree",
            "AdamWScheduleFreeClosure RAdamScheduleFreeClosure SGDScheduleFreeClosure",
        ),
        ("lion_pytorch", ""),
    ],
)
def test_classes_of_other_packages(package: str, names: str) -> None:
    """All that ask, and no other."""
    found = vars(pytest.importorskip(package)).values()
    found = {c for c in found if inspect.isclass(c) and issubclass(c, Optimizer)}
    own = {c for c in found if not c.__module__.startswith("torch.")}
    asking = {c.__name__ for c in own if what_a_step_asks_for(c) is not None}
    assert asking == set(names.split())


def test_classes_of_torch() -> None:
    found = vars(importlib.import_module("torch.optim")).values()
    for cls in found:
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not torch.optim.LBFGS:
            assert what_a_step_asks_for(cls) is None
