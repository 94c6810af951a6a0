"""mode="multi_tensor" where a step is not served, or fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, flat_state, params_like, same, set_grads
from optimizer_registry import maker
from test_multi_tensor import ExactSqrt
from test_optim_db import all_params
from torch import Tensor, nn
from torch.optim import SGD
from twins import SHAPES, Lion, Twins, fresh, sgd

import compileclip
from compileclip.fallback import FallbackWarning

__all__ = ["fresh"]


def test_no_memory_for_new_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing has changed, and the next step makes it."""
    params = params_like(SHAPES)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    opt = compileclip.wrap(Lion(groups), 1.0, mode="multi_tensor")
    before = clone_params(params)
    allocate = torch.empty_like

    def fail(tensor: Tensor, **kwargs: Any) -> Tensor:
        if tensor is params[3]:  # too large for the first check, which takes copies
            raise torch.OutOfMemoryError("no memory")
        return allocate(tensor, **kwargs)

    set_grads(params, 0)
    monkeypatch.setattr(torch, "empty_like", fail)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    monkeypatch.undo()
    assert_same(params, before, "parameter")
    assert not any(opt.state.values())
    opt.step()
    assert all(state["steps"] == 1 for state in opt.state.values())


def test_tied_and_overlapping_parameters() -> None:
    (p,) = params_like([(6,)])
    twin = clone_params([p])[0]

    def build(p: Any, mode: str) -> Any:
        halves = [nn.Parameter(p.data[:4]), nn.Parameter(p.data[2:])]
        return compileclip.wrap(sgd(halves), 1.0, mode=mode), halves

    (ours, mine), (theirs, other) = build(p, "multi_tensor"), build(twin, "eager")
    for halves in (mine, other):
        set_grads(halves, 0)
    with pytest.warns(FallbackWarning, match="share memory"):
        ours.step()
    theirs.step()
    assert_same([p], [twin], "memory")


def test_one_gradient_of_two_parameters() -> None:
    for write_grads in (None, True, False):
        twins = Twins(shapes=[(4,), (4,)], write_grads=write_grads)

        def change(i: int, p: Any, seen: list[Any] = []) -> None:  # noqa: B006
            if i == 0:
                seen[:] = [p.grad]
            else:
                p.grad = seen[0]

        for seed in range(3):
            twins.step(seed, served=write_grads is not True, change=change)


class ByShape(SGD):
    """Divides by the number of elements."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / p.numel())


class Normalizes(SGD):
    """Divides by a norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / (p.grad.norm() + 1), alpha=-group["lr"])


class CountsItself(SGD):
    """Keeps a number of its own."""

    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / self.count)


class Noisy(SGD):
    """Adds noise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    torch.manual_seed(0)
                    p.add_(p.grad + torch.randn_like(p), alpha=-group["lr"])


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ByShape, "depends on a parameter's shape"),
        (Normalizes, "not pointwise"),
        (CountsItself, "changes the optimizer's 'count'"),
        (Noisy, "a trial could leave a trace: Noisy.step calls 'torch.manual_seed'"),
    ],
)
def test_what_is_no_pointwise_step_is_refused_with_its_reason(cls: Any, reason: str) -> None:
    twins = Twins(lambda params: cls(params, lr=0.1), shapes=[(3, 4), (5,)])
    with pytest.warns(FallbackWarning, match=reason):
        twins.step(0, served=False)
    for seed in range(1, 4):
        twins.step(seed, served=False)
    assert reason in twins.ours.explain()


def test_some_parameters_are_served_and_some_are_not() -> None:
    """Complex, 0-dim and sparse ones step in eager mode, under the same norm."""

    def build(mode: str) -> Any:
        torch.manual_seed(0)
        values = [torch.randn(3, 4), torch.tensor(2.0), torch.randn(4, dtype=torch.complex64)]
        params = [nn.Parameter(v) for v in values]
        return compileclip.wrap(SGD(params, lr=0.1, momentum=0.9), 0.5, mode=mode)

    ours, theirs = build("auto"), build("eager")
    for seed in range(3):
        for opt in (ours, theirs):
            set_grads(all_params(opt), seed)
            opt.step()
        assert torch.equal(ours.total_norm, theirs.total_norm)
        assert_same(all_params(ours), all_params(theirs), "parameter")
    text = ours.explain()
    assert "multi_tensor" in text
    assert "eager" in text
    assert all(p.grad is not None for p in all_params(ours))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from compileclip.native import native_build

    monkeypatch.setenv("CXX", "no-such-compiler")
    native_build.load.cache_clear()
    twins = Twins(lambda params: SGD(params, lr=0.1, dampening=0.5, momentum=0.25))
    with pytest.warns(FallbackWarning, match="no C\\+\\+ compiler 'no-such-compiler'"):
        twins.step(0, served=False)
    twins.step(1, served=False)


def test_a_kernel_that_is_wrong_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from compileclip.lowering.cpp import cpp_kernel

    run = cpp_kernel.Kernel.__call__

    def wrong(self: Any, table: Any, sizes: Any, chunks: Any, scalars: Any, *rest: Any) -> None:
        run(self, table, sizes, chunks, [s * 1.01 for s in scalars], *rest)

    monkeypatch.setattr(cpp_kernel.Kernel, "__call__", wrong)
    twins = Twins()
    with pytest.warns(FallbackWarning, match="the compiled step makes another"):
        twins.step(0, served=False)
    twins.step(1, served=False)


@pytest.mark.parametrize("first", [False, True], ids=["a later step", "the first step"])
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adamax"])
def test_an_error_of_eager_mode_leaves_the_others_as_they_were(name: str, first: bool) -> None:
    """Torch raises for a sparse gradient before it steps with any parameter."""
    given = params_like([(5, 3)] * 3)
    ours, theirs = (
        compileclip.wrap(maker(name)(params), 1.0, mode=mode)
        for mode, params in (("auto", given), ("eager", clone_params(given)))
    )
    for step in range(4):
        for opt in (ours, theirs):
            params = opt.param_groups[0]["params"]
            set_grads(params, step)
            if step == (0 if first else 2):
                params[1].grad = params[1].grad.to_sparse()
                before = clone_params(params), copy.deepcopy(flat_state(opt))
                with pytest.raises(RuntimeError, match="sparse"):
                    opt.step()
                if opt is ours:
                    assert_same(params, before[0], "parameter")
                    for (_, mine), (_, other) in zip(flat_state(opt), before[1], strict=True):
                        assert same(mine, other)
                set_grads(params, step)  # eager mode may have scaled some
            with ExactSqrt():
                opt.step()
        assert_same(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], "parameter")
        assert same(ours.total_norm, theirs.total_norm)


class LateState(Lion):
    """Makes more state in its second step, and looks at all gradients before it steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("no sparse gradients")
        for p in params:
            state = self.state[p]
            if "first" in state and "second" not in state:
                state["second"] = torch.zeros_like(p)
            if "first" not in state:
                state["first"] = torch.zeros_like(p)
            for moment in state.values():
                moment.mul_(0.9).add_(p.grad)
                p.add_(moment, alpha=-0.1)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("touched", [False, True])
def test_an_error_of_eager_mode_leaves_no_new_state(at: int, touched: bool) -> None:
    given = params_like([(5, 3)] * 3)
    ours, theirs = (
        compileclip.wrap(LateState(params), 1.0, mode=mode)
        for mode, params in (("auto", given), ("eager", clone_params(given)))
    )
    for opt in (ours, theirs):
        params = all_params(opt)
        for step in range(5):
            set_grads(params, step)
            if step == at:
                before = [sorted(opt.state[p]) for p in params] if touched else None
                params[1].grad = params[1].grad.to_sparse()
                with pytest.raises(RuntimeError, match="sparse"):
                    opt.step()
                assert before in (None, [sorted(opt.state[p]) for p in params])
                set_grads(params, step)  # eager mode may have scaled some
            opt.step()
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    for (name, mine), (_, other) in zip(flat_state(ours), flat_state(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=name)
    assert ours._modes.kernels.why_not is None
