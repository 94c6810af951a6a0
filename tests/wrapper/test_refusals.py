"""What would be accepted and have no effect, or a wrong one, is refused when it is wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, params_like, set_grads
from torch import nn
from torch.optim import SGD, Optimizer

import compileclip
from compileclip.validation import BOUNDS

KEYS = ["max_norm", "norm_type", "norm_group", "max_grad_norm", "clip_value"]


@pytest.mark.parametrize("key", KEYS)
def test_a_bound_of_one_group(key: str) -> None:
    inner = SGD([{"params": params_like([(3,)]), key: 0.1}], lr=0.1)
    with pytest.raises(
        ValueError, match=f"a parameter group has {key}=0.1, which would be ignored"
    ):
        compileclip.wrap(inner, 1.0)


def test_a_bound_of_a_group_that_is_added_or_loaded() -> None:
    opt = compileclip.wrap(SGD(params_like([(3,)]), lr=0.1), 1.0)
    with pytest.raises(ValueError, match=r"max_norm=0\.1, which would be ignored"):
        opt.add_param_group({"params": params_like([(4,)]), "max_norm": 0.1})
    assert len(opt.param_groups) == 1
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(max_norm=0.1, lr=7.0)
    with pytest.raises(ValueError, match=r"max_norm=0\.1, which would be ignored"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1
    opt.add_param_group({"params": iter(params_like([(4,)]))})
    opt.add_param_group({"params": params_like([(5,)])[0]})
    assert [len(group["params"]) for group in opt.param_groups] == [1, 1, 1]


@pytest.mark.parametrize("key", ["max_norm", "gradient_clip_val"])
@pytest.mark.parametrize("mode", ["auto", "eager", "inductor"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_bound_of_a_group_that_comes_later(mode: str, key: str, steps: int) -> None:
    """And not through the wrapper, so that it is seen in the next step alone."""
    params = params_like([(3,), (4,)])
    opt = compileclip.wrap(SGD(params, lr=0.1, momentum=0.9), 1.0, mode=mode)
    for seed in range(steps):
        set_grads(params, seed)
        opt.step()
    set_grads(params, steps)
    with_it = [
        lambda: opt.param_groups[0].update({key: 0.1}),
        lambda: opt.optimizer.add_param_group({"params": params_like([(2,)]), key: 0.1}),
        lambda: opt.optimizer.load_state_dict(_with(opt.state_dict(), key)),
    ]
    for come in with_it:
        state = copy.deepcopy(opt.state_dict())
        come()
        before = [t.detach().clone() for p in params for t in (p, p.grad)]
        buffers = copy.deepcopy(dict(opt.state))
        with pytest.raises(ValueError, match=rf"{key}=0\.1, which would be ignored"):
            opt.step(lambda: pytest.fail("the closure was called"))
        assert_same([t for p in params for t in (p, p.grad)], before, "tensor")
        assert_same(_buffers(opt.state), _buffers(buffers), "state")
        del opt.param_groups[1:]
        opt.load_state_dict(state)
    opt.step()


def _with(state: dict[str, Any], key: str) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["param_groups"][0][key] = 0.1
    return state


def _buffers(state: Any) -> list[Any]:
    return [value["momentum_buffer"] for value in state.values() if len(value) > 0]


def test_a_bound_of_a_group_that_comes_after_a_step_was_compiled() -> None:
    params = params_like([(3,), (4,)])
    opt = compileclip.wrap(SGD(params, lr=0.1), 1.0)

    @compileclip.compile
    def train_step() -> None:
        sum(p.square().sum() for p in params).backward()
        opt.step()
        opt.zero_grad()

    train_step()
    train_step()
    opt.param_groups[0]["max_norm"] = 0.1
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"max_norm=0\.1, which would be ignored"):
        train_step()
    assert_same(params, before, "parameter")
    del opt.param_groups[0]["max_norm"]
    opt.zero_grad()
    train_step()
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("norm_type", 2.0, 1.0),
        ("nonfinite", "propagate", "typo"),
        ("write_grads", None, True),
        ("mode", "auto", "eager"),
        ("process_group", None, "typo"),
    ],
)
def test_what_cannot_be_set_later(name: str, value: Any, other: Any) -> None:
    opt = compileclip.wrap(SGD(params_like([(3,)]), lr=0.1), 1.0)
    remedy = rf"wrap\(opt.optimizer, opt.max_norm, {name}={other!r}\)"
    with pytest.raises(AttributeError, match=f"{name} is {value!r} since .*{remedy}"):
        setattr(opt, name, other)
    assert getattr(opt, name) == value
    if other != "typo":
        again = compileclip.wrap(opt.optimizer, opt.max_norm, **{name: other})
        assert getattr(again, name) == other


@pytest.mark.parametrize("value", [-1, float("nan")])
def test_a_bound_that_is_none(value: float) -> None:
    opt = compileclip.wrap(SGD(params_like([(3,)]), lr=0.1), 1.0)
    with pytest.raises(ValueError, match="is no bound of a norm"):
        opt.max_norm = value
    assert opt.max_norm == 1.0


class OwnClip(SGD):
    """An optimizer that clips by itself, which is its own business."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.defaults["max_grad_norm"] = 1.0
        for group in self.param_groups:
            group["max_grad_norm"] = 1.0


def test_a_hyperparameter_of_the_optimizer_is_its_own() -> None:
    params = params_like([(3,)])
    opt = compileclip.wrap(OwnClip(params), 1.0)
    set_grads(params, 0)
    opt.step()
    opt.param_groups[0]["max_grad_norm"] = 0.5
    opt.step()


@pytest.mark.parametrize("name", ["max_norm", "norm_type"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.tensor(1.0), "is a tensor, whose value would be read now"),
        (True, "is no number"),
        ("1.0", "is no number"),
        (np.array(1.0), "is no number"),
    ],
)
def test_a_bound_that_is_no_number(name: str, value: Any, reason: str) -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    options = {"max_norm": 1.0, name: value}
    with pytest.raises(TypeError, match=f"{name}.*{reason}"):
        compileclip.wrap(inner, **options)
    opt = compileclip.wrap(inner, np.float32(1.0), norm_type=2)
    if name == "max_norm":
        with pytest.raises(TypeError, match=reason):
            opt.max_norm = value
        assert opt.max_norm == 1.0


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_write_grads_is_a_bool_or_none(value: Any) -> None:
    with pytest.raises(ValueError, match="write_grads="):
        compileclip.wrap(SGD(params_like([(3,)]), lr=0.1), 1.0, write_grads=value)


def test_differentiable() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="no gradient flows through a step that clips"):
        compileclip.wrap(inner, 1.0)


class SAM(Optimizer):
    """Sharpness-aware minimization, as its users write it (Foret et al., 2020)."""

    def __init__(self, params: Any, base: Callable[[Any], Optimizer], rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "SAM requires closure"
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        moved = [p.grad * (self.param_groups[0]["rho"] / norm) for p in params]
        for p, way in zip(params, moved, strict=True):
            p.add_(way)
        closure()
        for p, way in zip(params, moved, strict=True):
            p.sub_(way)
        self.base_optimizer.step()
        return loss


def closure_of(opt: Optimizer) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = sum(p.square().sum() for group in opt.param_groups for p in group["params"])
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss

    return closure


def test_an_optimizer_around_another_one() -> None:
    """The remedy that is named is tried."""
    inner = SAM(params_like([(3,)]), lambda p: SGD(p, lr=0.1))
    with pytest.raises(ValueError, match=r"SAM steps another optimizer.*opt.base_optimizer ="):
        compileclip.wrap(inner, 1.0)
    (p,) = inner.param_groups[0]["params"]
    q = nn.Parameter(p.detach().clone())
    inner.base_optimizer = compileclip.wrap(inner.base_optimizer, 0.1)
    by_hand = SAM([q], lambda p: SGD(p, lr=0.1))

    def clip(*_: Any) -> None:
        compileclip.clip_grad_norm_([q], 0.1)

    by_hand.base_optimizer.register_step_pre_hook(clip)
    for _ in range(3):
        inner.step(closure_of(inner))
        by_hand.step(closure_of(by_hand))
    assert torch.equal(p, q)


@pytest.mark.parametrize("key", sorted(BOUNDS))
def test_a_bound_in_the_place_of_another_key(key: str) -> None:
    """As many keys as before."""
    params = params_like([(3,)])
    opt = compileclip.wrap(SGD([{"params": params, "name": "all"}], lr=0.1), 1.0)
    for step in range(3):
        set_grads(params, step)
        opt.step()
    group = opt.param_groups[0]
    del group["name"]
    group[key] = 0.1
    with pytest.raises(ValueError, match=f"{key}=0.1, which would be ignored"):
        opt.step()


class HandsOn(Optimizer):
    """As trainers put around an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_what_a_trainer_puts_around_an_optimizer() -> None:
    inner = SGD(params_like([(3,)]), lr=0.1)
    with pytest.raises(ValueError, match="HandsOn stands in front of another optimizer"):
        compileclip.wrap(HandsOn(inner), 1.0)
    outer = HandsOn(compileclip.wrap(inner, 1.0))  # the remedy
    set_grads(outer.param_groups[0]["params"], 0)
    outer.step()
