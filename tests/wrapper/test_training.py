"""A run goes on exactly like the unwrapped one, whatever happens to it on the way."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer
from runs import MAX_NORM, Run, adamw
from torch.optim import lr_scheduler

import compileclip

SCHEDULERS = {
    "none": None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),  # cycles betas
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
}
STEPS = range(10)


def assert_same_run(ours: Run, theirs: Run) -> None:
    assert_same(ours.model.parameters(), theirs.model.parameters(), "parameter")
    assert_same_optimizer(ours.optimizer, theirs.optimizer)
    assert_same(ours.norms, theirs.norms, "norm")
    for a, b in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {
            k: v for k, v in b.items() if k != "params"
        }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str) -> None:
    ours, theirs = (Run(wrapped, scheduler=SCHEDULERS[name]) for wrapped in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
        for step in STEPS:
            ours.step(step)
            theirs.step(step)
    assert_same_run(ours, theirs)
    assert max(n.item() for n in ours.norms) > MAX_NORM


def test_scheduler_made_before_wrapping() -> None:
    ours, theirs = Run(True), Run(False, scheduler=SCHEDULERS["cosine"])
    ours.scheduler = lr_scheduler.CosineAnnealingLR(ours.optimizer.optimizer, T_max=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in STEPS:
            ours.step(step)
            theirs.step(step)
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("name", ["none", "one_cycle"])
@pytest.mark.parametrize("to_wrapped", [True, False])
@pytest.mark.parametrize("from_wrapped", [True, False])
def test_checkpoint_moves_between_wrapped_and_unwrapped(
    from_wrapped: bool, to_wrapped: bool, name: str
) -> None:
    first, straight = (
        Run(from_wrapped, scheduler=SCHEDULERS[name]),
        Run(False, scheduler=SCHEDULERS[name]),
    )
    for step in range(5):
        first.step(step)
        straight.step(step)
    second = Run(to_wrapped, scheduler=SCHEDULERS[name])
    second.step(99)  # it has a state of its own, which loading replaces
    second.load(first.checkpoint())
    second.norms = first.norms
    for step in range(5, 10):
        second.step(step)
        straight.step(step)
    assert_same_run(second, straight)


def _deepcopied(run: Run) -> Run:
    return copy.deepcopy(run)


def _pickled(run: Run) -> Run:
    run.model, run.optimizer = pickle.loads(pickle.dumps((run.model, run.optimizer)))
    return run


def _group_added(run: Run) -> Run:
    run.optimizer.add_param_group({"params": list(run.model[4].parameters()), "lr": 0.05})
    return run


def _frozen(run: Run) -> Run:
    run.model[0].weight.requires_grad_(False)
    return run


def _reloaded(run: Run) -> Run:
    run.load(run.checkpoint())
    return run


def _zeroed_not_none(run: Run) -> Run:
    run.optimizer.zero_grad(set_to_none=False)
    return run


@pytest.mark.parametrize(
    "event", [_deepcopied, _pickled, _group_added, _frozen, _reloaded, _zeroed_not_none]
)
@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_event_between_steps(event: Any, write_grads: bool | None, fused: bool) -> None:
    def make(params: Any) -> Any:
        return adamw(params, fused=fused)

    ours = Run(True, make, write_grads=write_grads)
    # With grad_scale the kernel divides; write_grads=False scales copies, and so multiplies.
    theirs = Run(True, make, write_grads=True) if fused and write_grads is None else None
    theirs = theirs or Run(fused and write_grads is True, make)
    for step in range(4):
        ours.step(step)
        theirs.step(step)
    ours, theirs = event(ours), event(theirs)
    for step in range(4, 10):
        ours.step(step)
        theirs.step(step)
    assert_same_run(ours, theirs)


def test_copy_is_apart_from_its_original() -> None:
    run = Run(True)
    run.step(0)
    other = copy.deepcopy(run)
    before = [p.detach().clone() for p in run.model.parameters()]
    other.optimizer.max_norm = 0.1
    other.step(1)
    assert_same(run.model.parameters(), before, "parameter of the original")
    assert run.optimizer.max_norm == MAX_NORM


def test_closure() -> None:
    ours, theirs = Run(True), Run(False)
    for step in STEPS:
        calls = []

        def closure(run: Run, step: int = step, calls: list[int] = calls) -> Any:
            assert torch.is_grad_enabled()
            run.optimizer.zero_grad()
            loss = run.loss(step)
            loss.backward()
            calls.append(step)
            return loss

        def clipping(step: int = step, closure: Any = closure) -> Any:
            loss = closure(theirs)
            params = [p for group in theirs.optimizer.param_groups for p in group["params"]]
            compileclip.clip_grad_norm_(params, MAX_NORM)
            return loss

        loss = ours.optimizer.step(lambda closure=closure: closure(ours))
        assert loss == theirs.optimizer.step(clipping)
        assert len(calls) == 2
    assert_same_optimizer(ours.optimizer, theirs.optimizer)


def test_max_norm_may_change_at_any_step() -> None:
    run = Run(True, write_grads=True)
    for step, max_norm in enumerate([0.5, 0.01, None, float("inf"), 0.0, 3]):
        run.optimizer.max_norm = max_norm
        run.loss(step).backward()
        before = compileclip.get_total_norm([p.grad for p in run.model[:4].parameters()])
        run.optimizer.step()
        after = compileclip.get_total_norm([p.grad for p in run.model[:4].parameters()])
        assert run.optimizer.total_norm == before
        bound = before.item() if max_norm is None else min(before.item(), max_norm)
        assert after.item() == pytest.approx(bound, rel=1e-5)
        run.model.zero_grad()
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm"):
            run.optimizer.max_norm = wrong
    assert run.optimizer.max_norm == 3.0


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 4.0, float("inf"), -1.0, 0.0])
def test_norm_type(norm_type: float) -> None:
    run = Run(True, norm_type=norm_type, write_grads=True)
    run.loss(0).backward()
    grads = [p.grad.clone() for p in run.model[:4].parameters()]
    run.optimizer.step()
    assert run.optimizer.total_norm == compileclip.get_total_norm(grads, norm_type)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    compileclip.clip_grad_norm_(params, MAX_NORM, norm_type)
    assert_same(
        [p.grad for p in run.model[:4].parameters()], [p.grad for p in params], "clipped gradient"
    )
