"""Training steps that cannot be one graph: eager's result, with a reason, and what follows."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_traced_parameters import (
    Run,
    Step,
    _fresh,
    compile_step,
    finish,
    one_graph,
    train,
    zeroes_first,
)
from torch import Tensor
from torch._dynamo.utils import counters

from compileclip.fallback import FallbackWarning
from compileclip.graph import backward_leaves

__all__ = ["_fresh", "one_graph"]


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is FallbackWarning]


def halve(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


HOOKS: list[Callable[[Tensor], Any]] = [
    lambda p: p.register_hook(lambda grad: grad * 0.5),
    lambda p: p.register_post_accumulate_grad_hook(halve),
]


def test_another_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be patched leaves one graph, and is not run with gradients lost."""
    patched = torch._dynamo.variables.builder.get_static_address_type
    monkeypatch.delattr(torch._dynamo.variables.builder, "get_static_address_type")
    assert not backward_leaves.patch_dynamo()
    ours, theirs = (Run(zeroes_first) for _ in range(2))
    monkeypatch.setattr(torch._dynamo.variables.builder, "get_static_address_type", patched, False)
    monkeypatch.setattr("compileclip.graph.training_step.patch_dynamo", lambda: False)
    compile_step(ours)
    with pytest.warns(FallbackWarning, match="graph breaks: torch .* keeps elsewhere"):
        train(ours, theirs)


@pytest.mark.parametrize("add", HOOKS, ids=["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("late", [False, True])
def test_hooks_of_parameters_run(add: Callable[[Tensor], Any], late: bool) -> None:
    ours, theirs = (Run(zeroes_first) for _ in range(2))
    compile_step(ours)
    if late:
        train(ours, theirs, steps=2)
    handles = [add(run.params[0]) for run in (ours, theirs)]
    with pytest.warns(FallbackWarning, match="graph breaks: a parameter has a hook"):
        train(ours, theirs, first=2, steps=3)
    counters.clear()
    for handle in handles:
        handle.remove()
    train(ours, theirs, first=5, steps=3)
    assert not counters["graph_break"]  # one graph again
    add(ours.params[1])
    add(theirs.params[1])
    train(ours, theirs, first=8, steps=2)


def test_hooks_of_other_leaves_run() -> None:
    def layout(run: Run) -> Step:
        scale = torch.ones(2, requires_grad=True)
        scale.register_hook(seen.append)

        def step(x: Tensor) -> Tensor:
            run.optimizer.zero_grad()
            return finish(run, (run.model(x) * scale).square().sum())

        return step

    seen: list[Tensor] = []
    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    with pytest.warns(FallbackWarning, match="graph breaks: a parameter has a hook"):
        train(ours, theirs)
    assert len(seen) == 10


@pytest.mark.parametrize("add", HOOKS, ids=["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_the_step_itself_adds_and_removes(add: Callable[[Tensor], Any]) -> None:
    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            run.optimizer.zero_grad()
            loss = run.model(x).square().sum()
            handle = add(run.params[0])
            loss.backward()
            handle.remove()
            run.optimizer.step()
            return loss.detach()

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    with pytest.warns(FallbackWarning, match="falls back to"):
        train(ours, theirs)


def test_hooks_where_the_optimizer_steps_in_another_call() -> None:
    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            loss = run.model(x).square().sum()
            loss.backward()
            return loss.detach()

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    for run in (ours, theirs):
        run.params[0].register_hook(lambda grad: grad * 0.5)
    theirs.step(torch.ones(3, 4))
    with pytest.warns(FallbackWarning, match="graph breaks: a parameter has a hook"):
        ours.step(torch.ones(3, 4))
    torch.testing.assert_close(ours.params[0].grad, theirs.params[0].grad)


def test_hooks_where_one_graph_is_demanded() -> None:
    run = Run(zeroes_first)
    compile_step(run, fullgraph=True)
    run.step(torch.ones(3, 4))
    handle = run.params[0].register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match="a parameter has a hook"):
        run.step(torch.ones(3, 4))
    handle.remove()
    run.step(torch.ones(3, 4))


@pytest.mark.parametrize("mark", [slice(0, 1), slice(0, 2)], ids=["some", "all"])
def test_parameters_that_became_constants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mark: slice
) -> None:
    """Should Dynamo lose gradients all the same, for reasons of its own, that is not silent."""

    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            for p in run.params:
                p.grad = None
            return finish(run, run.raw(x).square().sum())

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    monkeypatch.setattr(backward_leaves.Leaves, "stay_inputs", lambda _: contextlib.nullcontext())
    for p in ours.params[mark]:
        torch._dynamo.mark_static_address(p, guard=True)
    compile_step(ours)
    with pytest.warns(FallbackWarning, match="graph breaks: a parameter is a constant"):
        train(ours, theirs)


def test_steps_without_gradients() -> None:
    """Before the first backward there is nothing to step with; then one graph does."""

    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            run.optimizer.step()
            run.optimizer.zero_grad()
            loss = run.model(x).square().sum()
            loss.backward()
            return loss.detach()

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    with pytest.warns(FallbackWarning, match="falls back to eager: no parameter has a gradient"):
        train(ours, theirs, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        train(ours, theirs, first=1)
    assert not counters["graph_break"]


def test_steps_that_never_have_gradients() -> None:
    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            loss = run.model(x).square().sum()
            run.optimizer.step()
            return loss.detach()

        return step

    run = Run(layout)
    compile_step(run)
    before = [p.detach().clone() for p in run.params]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            run.step(torch.ones(3, 4))
    assert len(messages(caught)) == 2  # to eager, and later to graph breaks for good
    for p, q in zip(run.params, before, strict=True):
        assert torch.equal(p, q)


def test_frozen_parameters_are_no_lost_gradients() -> None:
    run = Run(lambda run: lambda x: finish(run, (run.model(x) * x[:, :2]).sum()))
    compile_step(run)
    for p in run.params:
        p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        run.step(torch.ones(3, 4, requires_grad=True))
