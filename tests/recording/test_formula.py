"""The function that finds a step's scalars without the optimizer's own step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same_optimizer, clone_params, params_like, set_grads
from optimizer_registry import makers, names
from torch import Tensor
from torch.optim import ASGD, AdamW, Optimizer
from twins import Lion

import compileclip
from compileclip.buckets.bucket_step import tensors
from compileclip.recording.scalar_formula import Formula
from compileclip.recording.shadow import ChangedError

SHAPES = [(3, 4), (5,), (700,)]
MAKERS = makers(names(lambda entry: entry.has_formula))
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def wrapped(make: Callable[[Any], Optimizer], **options: Any) -> Any:
    return compileclip.wrap(make(params_like(SHAPES)), 1.0, mode="multi_tensor", **options)


def step(opt: Any, seed: int) -> None:
    set_grads([p for group in opt.param_groups for p in group["params"]], seed)
    opt.step()


def works(opt: Any) -> list[Any]:
    return opt._modes.kernels._works


def formulas(opt: Any) -> list[Formula | None]:
    return [work.formula for work in works(opt)]


def cycle(group: dict[str, Any], i: int) -> None:
    """Change each number of a group that a scheduler or a user changes."""
    group["lr"] = 0.01 * (1 + math.cos(i))
    if "betas" in group:
        group["betas"] = (0.8 + 0.01 * i, group["betas"][1])
    if group.get("momentum"):
        group["momentum"] = 0.8 + 0.01 * i
    if group["weight_decay"]:
        group["weight_decay"] = 0.1 / (i + 1)


@EVERY
def test_scalars_and_counts_are_those_of_the_step(make: Callable[[Any], Optimizer]) -> None:
    opt = wrapped(make)
    for i in range(7):  # RAdam's sixth is another
        step(opt, i)
    (formula,) = formulas(opt)
    assert formula is not None
    (work,) = works(opt)
    for i in range(20):
        (group,) = opt.param_groups
        cycle(group, i)
        before = dict(work.bucket.values)
        theirs = tensors(work.bucket.leader, before)
        scalars, after = formula.run(group, before)
        assert scalars == work._trace.run(group, theirs)
        assert after == {name: count.item() for name, count in theirs.items()}
        step(opt, i)
    assert formulas(opt) == [formula]


@EVERY
def test_a_number_that_turns_to_zero_and_back(make: Callable[[Any], Optimizer]) -> None:
    opt = wrapped(make)
    theirs = compileclip.wrap(
        make(clone_params(opt.param_groups[0]["params"])), 1.0, mode="eager", write_grads=False
    )
    for i in range(10):
        for each in (opt, theirs):
            for name in ("weight_decay", "momentum", "lr_decay"):
                if each.defaults.get(name):
                    each.param_groups[0][name] = each.defaults[name] if i % 4 < 2 else 0
            step(each, i)
        for p, q in zip(
            opt.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True
        ):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # 1.6e-7 seen: square roots
            counts = [k for k, v in opt.state[p].items() if isinstance(v, Tensor) and v.dim() == 0]
            assert all(torch.equal(opt.state[p][k], theirs.state[q][k]) for k in counts)


@pytest.mark.parametrize(
    "lr", [1, np.float64(0.5), torch.tensor(0.25)], ids=["int", "numpy", "tensor"]
)
def test_other_kinds_of_numbers(lr: Any) -> None:
    ours = wrapped(MAKERS["SGD, Nesterov"])
    theirs = MAKERS["SGD, Nesterov"](clone_params(ours.param_groups[0]["params"]))
    theirs = compileclip.wrap(theirs, 1.0, mode="eager", write_grads=False)
    for i in range(9):
        for opt in (ours, theirs):
            opt.param_groups[0]["lr"] = lr if 3 <= i < 6 else 0.1
            step(opt, i)
        assert_same_optimizer(ours.optimizer, theirs.optimizer)
    assert formulas(ours) != [None]


def test_a_step_that_always_decides_otherwise_is_not_traced_for_ever() -> None:
    opt = wrapped(MAKERS["Adam, amsgrad"])
    for i in range(30):
        opt.param_groups[0]["weight_decay"] = 0.1 * (i % 2)
        step(opt, i)
    assert formulas(opt) == [None]


class Hidden(AdamW):
    """Could have a schedule of its own, that no parameter group shows."""

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return super()._init_group(*args, **kwargs)


class Inherited(AdamW):
    """Has torch's step, and could have whatever that calls."""


@pytest.mark.parametrize("kind", [Lion, Hidden, Inherited, ASGD])
def test_only_what_is_known_to_depend_on_nothing_else(kind: Any) -> None:
    opt = wrapped(kind)
    for i in range(3):
        step(opt, i)
    assert formulas(opt) == [None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", None),
        ("lr", "0.1"),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("maximize", 1),
        ("eps", True),
    ],
)
def test_another_kind_of_value_is_another_step(name: str, value: object) -> None:
    opt = wrapped(AdamW)
    for i in range(3):
        step(opt, i)
    (formula,), (work,) = formulas(opt), works(opt)
    assert formula is not None
    group = opt.param_groups[0]
    counts = work.bucket.values
    formula.run(group, counts)
    with pytest.raises(ChangedError):
        formula.run({**group, name: value}, counts)
    with pytest.raises(ChangedError):
        formula.run({**group, "another": 1.0}, counts)
    with pytest.raises(ChangedError):
        formula.run({("other" if k == name else k): v for k, v in group.items()}, counts)
