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

CASES = {
    foreign.StepInGroup: "the shadow counts in the real group's tensor",
    foreign.StepInState: "the shadow has a state of its own, and the real one is never counted",
    foreign.StepInList: "the shadow counts in the real list",
    foreign.DictOfTensors: "the shadow's dict becomes the state of every parameter",
    foreign.Queue: "the shadow's queue becomes the state of every parameter",
    foreign.PowerInPlace: "pow_.Scalar is taken for pow.Scalar, whose base is the number",
    foreign.Lottery: "a random number is drawn once for all parameters",
    foreign.Dithered: "the shadow draws random numbers before it is refused",
    foreign.Around: "the shadow steps the real inner optimizer",
    foreign.GroupedAround: "the shadow steps the real inner optimizer",
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


def check(cls: Any, mode: str) -> None:
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


@pytest.mark.parametrize("cls", CASES)
def test_in_eager_mode(cls: Any) -> None:
    check(cls, "eager")


@pytest.mark.parametrize(
    "cls",
    [pytest.param(k, marks=pytest.mark.xfail(reason=v, strict=True)) for k, v in CASES.items()],
)
def test_in_whatever_mode_serves(cls: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        check(cls, "auto")
