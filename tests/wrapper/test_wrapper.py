"""ClippedOptimizer as a torch.optim.Optimizer: hooks, delegation, foreign optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same, params_like, set_grads
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from wrapper_cases import both, grads_of, wrapped_sgd

import compileclip

__all__ = ["both"]


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


def test_eager_steps_scale_no_gradient_that_is_not_clipped() -> None:
    """Fused kernels that are given a scale write the gradients back."""
    given = []

    class Watched(AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            given.append(getattr(self, "grad_scale", None))
            return super().step(closure)

    Watched.step.__module__ = AdamW.step.__module__
    param = torch.nn.Parameter(torch.randn(40))
    param.grad = torch.randn(40)
    opt = compileclip.wrap(Watched([param], fused=True), max_norm=1e3, mode="eager")
    opt.step()
    opt.max_norm = 1e-3
    opt.step()
    unclipped, clipped = given
    assert unclipped is None
    assert clipped > 1
