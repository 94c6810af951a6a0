"""Random lives of an optimizer: steps by the native call against those without it, bit for bit."""

from __future__ import annotations

import copy
import io
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import flat_state, params_like, same
from optimizer_registry import makers
from torch import nn

import compileclip
from compileclip.fallback import FallbackWarning

SHAPES = [(3, 4), (5,), (1,), (0, 2), (2, 3, 2), (70, 30)]
OPTIMIZERS = makers(
    ["AdamW", "SGD, Nesterov", "RAdam, decay", "Adagrad, decay", "NAdam", "ASGD"], lr=0.01
)


class Life:
    """An optimizer, and the same random numbers for whoever else lives it."""

    def __init__(self, name: str, seed: int, **options: Any) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        params = params_like(SHAPES)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
        self.opt: Any = compileclip.wrap(OPTIMIZERS[name](groups), 1.0, **options)
        self.extra: list[Any] = []

    @property
    def params(self) -> list[Any]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def any(self) -> Any:
        return self.random.choice(self.params)

    def randn(self, p: Any) -> Any:
        return torch.randn(p.shape, generator=self.generator, dtype=p.dtype)

    def give(self) -> None:
        moves = self.random.random() < 0.6
        for p in self.params:
            if p.grad is None or (moves and self.random.random() < 0.8):
                p.grad = self.randn(p)
            else:
                p.grad.copy_(self.randn(p))


def _transposed(life: Life) -> None:
    p = life.params[0]
    p.grad = life.randn(p).t().contiguous().t()


def _loaded(life: Life) -> None:
    buffer = io.BytesIO()
    torch.save(life.opt.state_dict(), buffer)
    buffer.seek(0)
    life.opt.load_state_dict(torch.load(buffer))


def _copied(life: Life) -> None:
    life.opt = copy.deepcopy(life.opt)
    life.give()


def _added(life: Life) -> None:
    if len(life.opt.param_groups) < 4:
        p = nn.Parameter(torch.ones(4))
        p.grad = torch.ones(4)
        life.opt.add_param_group({"params": [p], "lr": 0.03})


def _counted(life: Life) -> None:
    for state in life.opt.state.values():
        if "step" in state and isinstance(state["step"], torch.Tensor):
            state["step"].add_(2)


def _one_counted(life: Life) -> None:
    state = life.opt.state.get(life.any(), {})
    if isinstance(state.get("step"), torch.Tensor):
        state["step"] += 1


def _moved(life: Life) -> None:
    state = life.opt.state.get(life.any(), {})
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim():
            if life.random.random() < 0.5:
                value.data = value.data.clone()
            else:
                state[name] = value.clone()


def _swapped(life: Life) -> None:
    p = life.any()
    torch.utils.swap_tensors(p, nn.Parameter(life.randn(p)))
    life.give()


def _bad(life: Life) -> None:
    p = life.params[-1]
    p.grad = torch.full_like(p, life.random.choice([math.nan, math.inf]))


def _set(name: str, *values: Any) -> Callable[[Life], None]:
    def change(life: Life) -> None:
        life.random.choice(life.opt.param_groups)[name] = life.random.choice(values)

    return change


EVENTS: dict[str, Callable[[Life], None]] = {
    "nothing": lambda life: None,
    "learning rate": _set("lr", 0.1, 0.03, 1, 0.0, 1e-8),
    "weight decay": _set("weight_decay", 0.0, 0.1, 0),
    "maximize": _set("maximize", True, False),
    "bound": lambda life: setattr(life.opt, "max_norm", life.random.choice([0.1, 5, math.inf])),
    "no bound": lambda life: setattr(life.opt, "max_norm", life.random.choice([None, 1.0])),
    "no gradient": lambda life: setattr(life.any(), "grad", None),
    "transposed": _transposed,
    "a parameter's memory": lambda life: (
        (p := life.any()) is None or setattr(p, "data", p.data.clone())
    ),
    "parameter written": lambda life: life.any().data.mul_(0.9),
    "state moved": _moved,
    "counts": _counted,
    "a count": _one_counted,
    "loaded": _loaded,
    "copied": _copied,
    "another group": _added,
    "swapped": _swapped,
    "not finite": _bad,
    "threads": lambda life: torch.set_num_threads(life.random.choice([1, 2])),
    "lists": lambda life: [g.update(params=list(g["params"])) for g in life.opt.param_groups],
    "odd entry": lambda life: life.opt.param_groups[0].update(mine=life.random.random()),
    "zero_grad": lambda life: (life.opt.zero_grad(life.random.random() < 0.5), life.give()),
    "state forgotten": lambda life: life.opt.state.pop(life.any(), None),
}


def step(life: Life) -> str | None:
    """Step; the error, if there was one."""
    try:
        life.opt.step()
    except (RuntimeError, KeyError) as error:  # of state that is gone, in torch 2.11
        return type(error).__name__
    return None


def assert_alike(one: Life, other: Life) -> None:
    assert (one.opt.total_norm is None) == (other.opt.total_norm is None)
    if one.opt.total_norm is not None:
        assert same(one.opt.total_norm, other.opt.total_norm)
    for p, q in zip(one.params, other.params, strict=True):
        assert same(p, q)
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or same(p.grad, q.grad)
    states = flat_state(one.opt), flat_state(other.opt)
    for (name, a), (_, b) in zip(*states, strict=True):
        if isinstance(a, torch.Tensor):
            assert same(a, b), name
        else:
            assert a == b, name


LIVES = 30
QUICK: list[int] = []  # how many steps of each life were by the native call


@pytest.mark.parametrize("seed", range(LIVES))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lives(name: str, seed: int) -> None:
    chosen = random.Random(f"{name} {seed}")
    nonfinite = chosen.choice(["propagate", "skip", "raise"])
    write = chosen.choice([None, True, False])
    lives = [Life(name, seed, nonfinite=nonfinite, write_grads=write) for _ in range(2)]
    threads, quick = torch.get_num_threads(), 0
    told: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", FallbackWarning)
            for _ in range(40):
                event = chosen.choice(list(EVENTS)) if chosen.random() < 0.4 else "nothing"
                told.append(event)
                for life in lives:
                    life.give()
                    EVENTS[event](life)
                kernels = lives[0].opt._modes.kernels
                steady = None if kernels is None else kernels.steady
                if lives[1].opt._modes.kernels is not None:
                    lives[1].opt._modes.kernels.steady = None
                found = [step(life) for life in lives]
                assert found[0] == found[1], told
                quick += steady is not None and kernels.steady is steady
                assert_alike(*lives)
    finally:
        torch.set_num_threads(threads)
    QUICK.append(quick)


def test_many_steps_were_by_the_native_call() -> None:
    if len(QUICK) < LIVES * len(OPTIMIZERS):
        pytest.skip("not all lives were lived")
    assert sum(QUICK) > 10 * len(QUICK)  # of 40 steps each
