"""How long plans of mode multi_tensor live, and what of them stays behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from helpers import assert_same, clone_params, params_like, set_grads
from torch.fx import graph_module
from torch.optim import SGD, AdamW

import compileclip
from compileclip.multi_tensor.plan_backoff import ENOUGH, REST, TRIES, PlanBackoff

SHAPES = [(3, 4), (5,), (2, 3, 2), (7,)]


def test_patience() -> None:
    """Plans that serve few steps are followed by ever longer rests, until one serves more."""
    patience = PlanBackoff()
    assert patience.may_plan()
    assert all(patience.may_plan() for _ in range(TRIES))
    for rest in (*(REST[0] << i for i in range(7)), REST[1], REST[1]):
        refused = 0
        while not patience.may_plan():
            refused += 1
        assert refused == min(rest, REST[1])
    for _ in range(ENOUGH):
        patience.steps += 1
    assert all(patience.may_plan() for _ in range(1 + TRIES))
    assert not patience.may_plan()


@pytest.mark.parametrize("mode", ["auto", "multi_tensor"])
def test_gradients_that_come_and_go_at_every_step(mode: str) -> None:
    """By itself the wrapper goes eager for a while; a mode asked for by name stays."""
    params = params_like(SHAPES)
    others = clone_params(params)
    make: Any = lambda p: SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
    ours, theirs = compileclip.wrap(make(params), 1.0, mode=mode), make(others)
    reasons = []
    for step in range(60):
        for tensors in (params, others):
            set_grads(tensors, step)
            if step < 30:
                tensors[step % 4].grad = None
        ours.step()
        compileclip.clip_grad_norm_(others, 1.0)
        theirs.step()
        assert_same(params, others, "parameter")
        assert ours._modes.kernels is not None
        reasons.append(ours._modes.kernels.why_not)
    assert reasons[0] is None
    assert reasons[-1] is None
    rested = [why for why in reasons if why is not None]
    assert len(rested) == (0 if mode == "multi_tensor" else 16 + 32)
    assert all("others from step to step" in why[0] for why in rested)


def test_nothing_is_left_of_plans() -> None:
    """Not in torch's cache of the sources of graphs either."""
    params = params_like(SHAPES)
    opt = compileclip.wrap(AdamW(params), 1.0, mode="multi_tensor")

    def steps(count: int) -> tuple[int, int]:
        for step in range(count):
            set_grads(params, 0)
            params[step % 4].grad = None
            opt.step()
        gc.collect()
        return len(gc.get_objects()), len(graph_module._loader.eval_cache)

    steps(20)
    before = steps(20)
    after = steps(40)
    assert after[1] == before[1]
    assert after[0] - before[0] < 20


def test_what_is_dropped_is_freed_at_once() -> None:
    """Not when Python next looks for cycles: memory of a GPU may not wait for that."""
    AdamW(params_like(SHAPES))  # torch keeps the frames of a first one
    gc.collect()
    gc.disable()
    try:
        params = params_like(SHAPES)
        opt = compileclip.wrap(AdamW(params), 1.0)
        for step in range(3):
            set_grads(params, step)
            opt.step()
        alive = [weakref.ref(p) for p in params]
        alive += [weakref.ref(state["exp_avg"]) for state in opt.state.values()]
        del params, opt
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
