"""Optimizers that do what torch's never do: they step as they would bare, in whatever mode."""

from __future__ import annotations

import warnings
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
from helpers import assert_same, clone_params, params_like, set_grads
from torch import Tensor

import compileclip
from compileclip.fallback import FallbackWarning

# And what explain() says of it in mode="auto"; None where it is served.
CASES = {
    foreign.StepInGroup: "changes 'step' in its parameter group in place",
    foreign.StepInState: "keeps state that is of no parameter",
    foreign.StepInList: "changes 'count' of the optimizer in place",
    foreign.DictOfTensors: "the state 'buffers' is a dict",
    foreign.Queue: "the state 'queue' is a deque",
    foreign.PowerInPlace: None,
    foreign.Lottery: "draws random numbers",
    foreign.Dithered: "draws random numbers",
    foreign.Around: "keeps a SGD in its attribute 'inner'",
    foreign.AroundAMethod: "keeps a method in its attribute 'inner_step'",
    foreign.GroupedAround: "keeps a SGD in its attribute 'inner'",
}
SHAPES = [(3, 4), (5,), (2, 3, 2)]


def flat(value: Any) -> list[Tensor]:
    """The tensors in some state, numbers as tensors too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, int | float):
        return [torch.tensor(value, dtype=torch.float64)]
    return [t for v in value for t in flat(v)]


def check(cls: Any, mode: str) -> compileclip.ClippedOptimizer:
    params = params_like(SHAPES)
    others = clone_params(params)
    ours, theirs = compileclip.wrap(cls(params), 1.0, mode=mode), cls(others)
    for seed in range(5):
        for tensors in (params, others):
            set_grads(tensors, seed)
        torch.manual_seed(seed)
        ours.step()
        torch.manual_seed(seed)
        norm = compileclip.clip_grad_norm_(others, 1.0)
        theirs.step()
        assert_same([ours.total_norm], [norm], "norm")
        assert_same(params, others, "parameter")
    mine, other = (flat(list(opt.state.values())) for opt in (ours, theirs))
    assert_same(mine, other, "state")
    return ours


@pytest.mark.parametrize("cls", CASES)
def test_in_eager_mode(cls: Any) -> None:
    check(cls, "eager")


@pytest.mark.parametrize("cls", CASES)
def test_in_whatever_mode_serves(cls: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        table = check(cls, "auto").explain()
    assert (CASES[cls] or "multi_tensor") in table
