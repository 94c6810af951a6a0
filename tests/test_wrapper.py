"""ClippedOptimizer as a torch.optim.Optimizer: hooks, delegation, foreign optimizers, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same, params_like, set_grads
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import compileclip
from compileclip import eager


@pytest.fixture(autouse=True, params=["", "1"], ids=["compiled", "eager"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test as users have it, and with everything compiled switched off."""
    monkeypatch.setenv("COMPILECLIP_DISABLE", request.param)


def wrapped_sgd(**options: Any) -> Any:
    params = params_like([(3, 3), (3,)])
    set_grads(params, seed=0, scale=10)
    return compileclip.wrap(SGD(params, lr=0.1), 1.0, **options)


def grads_of(optimizer: Optimizer) -> list[Tensor]:
    return [
        p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None
    ]


class Foreign(Optimizer):
    """Somebody's optimizer: no closure, a step count in the group, a statistic of all gradients."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "steps": 0})

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        largest = max(g.abs().max() for g in grads)
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / largest * group["lr"] / group["steps"])

    def extra(self) -> str:
        return "own method"


def test_it_is_an_optimizer_over_the_same_things() -> None:
    inner = AdamW(params_like([(3, 3)]), lr=0.1)
    opt = compileclip.wrap(inner, 1.0)
    assert isinstance(opt, Optimizer)
    assert isinstance(opt, compileclip.ClippedOptimizer)
    assert opt.optimizer is inner
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    assert opt.total_norm is None
    opt.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5
    assert (opt.max_norm, opt.norm_type, opt.nonfinite, opt.write_grads, opt.mode) == (
        (1.0, 2.0, "propagate", None, "auto")
    )
    opt.state = {}
    assert inner.state == {}
    opt.param_groups = []
    assert inner.param_groups == []
    opt.defaults = {"lr": 1.0}
    assert inner.defaults == {"lr": 1.0}


def test_repr_names_the_settings_and_the_wrapped() -> None:
    text = repr(wrapped_sgd(nonfinite="skip"))
    assert text.startswith("ClippedOptimizer (max_norm=1.0, norm_type=2.0, nonfinite='skip'")
    assert "SGD (" in text
    assert "lr: 0.1" in text


def test_hooks_run_once_around_clip_and_update() -> None:
    log: list[tuple[str, type, float]] = []

    def hook(name: str) -> Any:
        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            size = float(compileclip.get_total_norm(grads_of(optimizer)))
            log.append((name, type(optimizer), round(size, 3)))

        return note

    params = params_like([(3, 3), (3,)])
    set_grads(params, seed=0, scale=10)
    inner = SGD(params, lr=0.1)
    inner.register_step_pre_hook(hook("inner pre"))
    opt = compileclip.wrap(inner, 1.0, write_grads=True)
    handles = [
        opt.register_step_pre_hook(hook("pre")),
        opt.register_step_post_hook(hook("post")),
        inner.register_step_post_hook(hook("inner post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    size = round(float(compileclip.get_total_norm(grads_of(opt))), 3)
    opt.step()
    kind = compileclip.ClippedOptimizer
    assert log == [
        ("global pre", kind, size),
        ("inner pre", kind, size),
        ("pre", kind, size),
        ("post", kind, 1.0),
        ("inner post", kind, 1.0),
        ("global post", kind, 1.0),
    ]
    for handle in handles:
        handle.remove()
    log.clear()
    opt.step()
    assert [name for name, _, _ in log] == ["inner pre"]


def test_pre_hook_may_change_gradients_and_the_closure() -> None:
    opt = wrapped_sgd()

    def double(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        for g in optimizer.param_groups:
            for p in g["params"]:
                p.grad.mul_(2)
        return (args[0], lambda: 7.0), {}

    size = compileclip.get_total_norm(grads_of(opt))
    opt.register_step_pre_hook(double)
    assert opt.step() == 7.0
    assert opt.total_norm.item() == pytest.approx(2 * size.item(), rel=1e-6)


def test_state_dict_hooks() -> None:
    opt, log = wrapped_sgd(), []
    opt.register_state_dict_pre_hook(lambda o: log.append("pre save"))
    opt.register_state_dict_post_hook(lambda o, sd: sd | {"extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, sd: log.append("pre load"))
    opt.register_load_state_dict_post_hook(lambda o: log.append("post load"))
    saved = opt.state_dict()
    assert saved["extra"] == 1
    opt.load_state_dict(saved)
    assert log == ["pre save", "pre load", "post load"]


def test_zero_grad() -> None:
    opt = wrapped_sgd()
    opt.zero_grad(set_to_none=False)
    assert all(not g.any() for g in grads_of(opt))
    opt.zero_grad()
    assert grads_of(opt) == []


def test_no_gradient_at_all() -> None:
    opt = wrapped_sgd(nonfinite="raise")
    before = [p.detach().clone() for g in opt.param_groups for p in g["params"]]
    opt.zero_grad()
    opt.step()
    assert opt.total_norm.item() == 0.0
    assert_same([p for g in opt.param_groups for p in g["params"]], before, "parameter")


@pytest.mark.parametrize("write_grads", [None, True, False])
def test_foreign_optimizer(write_grads: bool | None) -> None:
    ours, theirs = (params_like([(20, 20), (3,)]) for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a)
    opt, bare = compileclip.wrap(Foreign(ours), 1.0, write_grads=write_grads), Foreign(theirs)
    for step in range(4):
        set_grads(ours, step)
        set_grads(theirs, step)
        before = grads_of(opt)
        compileclip.clip_grad_norm_(theirs, 1.0)
        opt.step()
        bare.step()
        assert_same(ours, theirs, "parameter")
        if write_grads is not None:
            assert_same(grads_of(opt), grads_of(bare) if write_grads else before, "gradient")
    assert opt.param_groups[0]["steps"] == 4
    assert opt.extra() == "own method"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = opt.no_such_thing


def test_copies_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """write_grads=False never holds a second copy of all gradients."""
    monkeypatch.setattr(eager, "COPY_BYTES", 4000)
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
        p.detach() - 0.1 * p.grad * eager.reference.clip_coef(0.5, n)
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


def test_empty_group_works() -> None:
    opt = compileclip.wrap(SGD([{"params": []}], lr=0.1), 1.0)
    opt.step()
    assert opt.total_norm == 0.0
    with pytest.raises(ValueError, match="empty parameter list"):
        compileclip.wrap(SGD([], lr=0.1), 1.0)


def test_bad_arguments() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "max_norm=-1.0", {"max_norm": -1.0}),
        (ValueError, "max_norm=nan", {"max_norm": math.nan}),
        (TypeError, "max_norm='big'", {"max_norm": "big"}),
        (TypeError, "norm_type=None", {"max_norm": 1.0, "norm_type": None}),
        (ValueError, "norm_type is nan", {"max_norm": 1.0, "norm_type": math.nan}),
        (ValueError, "nonfinite='ignore'", {"max_norm": 1.0, "nonfinite": "ignore"}),
        (ValueError, "write_grads='yes'", {"max_norm": 1.0, "write_grads": "yes"}),
        (ValueError, "mode='fast'", {"max_norm": 1.0, "mode": "fast"}),
    ]
    for error, message, options in wrong:
        with pytest.raises(error, match=message):
            compileclip.wrap(inner, **options)
    with pytest.raises(TypeError, match="got Linear"):
        compileclip.wrap(torch.nn.Linear(2, 2), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wrapped already"):
        compileclip.wrap(compileclip.wrap(inner, 1.0), 1.0)
    with pytest.raises(ValueError, match="needs a closure"):
        compileclip.wrap(torch.optim.LBFGS(params_like([(3,)])), 1.0)


def test_gradient_on_another_device_than_its_parameter() -> None:
    a, b = params_like([(3,), (3,)])
    set_grads([a, b], seed=0)
    opt = compileclip.wrap(SGD([a, b], lr=0.1), 0.1)
    before, grad = a.detach().clone(), a.grad.clone()

    class Moved(torch.nn.Parameter):
        device = torch.device("meta")

    b.__class__ = Moved
    with pytest.raises(RuntimeError, match=r"shape \(3,\) on meta has its gradient on cpu"):
        opt.step()
    assert_same([a, a.grad], [before, grad], "tensor")


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
def test_meta_tensors(nonfinite: str) -> None:
    """As torch: a step has shapes but no values; a decision by value is an error."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    opt = compileclip.wrap(SGD([p], lr=0.1), 1.0, nonfinite=nonfinite)
    if nonfinite == "propagate":
        opt.step()
        assert opt.total_norm.is_meta
    else:
        with pytest.raises(RuntimeError, match="meta"):
            opt.step()
