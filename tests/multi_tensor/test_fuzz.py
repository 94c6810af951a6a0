"""mode="multi_tensor" against eager in random cases: shapes, strides, dtypes, groups, gradients."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import pytest
import torch
from fuzz_cases import EVENTS, EXACT, GRAD_LAYOUTS, MAKERS, Model, give_gradients, happen
from helpers import assert_same, flat_state, same
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from optimizer_registry import OPTIMIZERS
from test_multi_tensor import ExactSqrt
from test_optim_db import all_params
from torch import Tensor
from torch.optim import ASGD

import compileclip

# Of the larger of values and gradients. Half precision, where ATen rounds the last few elements of
# a tensor otherwise than the others; and all dtypes once eager's roots, as it takes them, came in.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CLOSE = {torch.bfloat16: 4e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-12}


def fuzz(examples: int) -> Any:
    health = list(HealthCheck)
    # To find a smaller example takes hundreds, each seconds of Triton's interpreter.
    phases = [Phase.explicit, Phase.generate, *([] if INTERPRETED else [Phase.shrink])]
    return settings(
        max_examples=examples,
        database=None,
        suppress_health_check=health,
        phases=phases,
        print_blob=True,
    )


@fuzz(60)
@given(data=st.data())
def test_random_steps(data: st.DataObject) -> None:
    Twins(data).run(data)


@pytest.mark.sweep
@fuzz(3000)
@given(data=st.data())
def test_more_random_steps(data: st.DataObject) -> None:
    Twins(data).run(data)


class Twins:
    """The same model and optimizer twice: in this mode and in eager."""

    def __init__(self, data: st.DataObject) -> None:
        self.model = Model(data)
        self.write_grads = data.draw(st.sampled_from([None, True, False]))
        options = [("multi_tensor", self.write_grads), ("eager", bool(self.write_grads))]
        self.ours, self.theirs = (
            compileclip.wrap(self.model.optimizer(), 1.0, mode=mode, write_grads=write)
            for mode, write in options
        )
        self.rough = False

    def run(self, data: st.DataObject) -> None:
        for step in range(data.draw(st.integers(1, 6))):
            event, which = data.draw(st.sampled_from(EVENTS)), data.draw(st.integers(0, 99))
            if self.model.overlap and event in ("replace state", "move"):
                event = "nothing"
            seed = self.model.seed + step
            twins = [(self.ours, self.theirs), (self.theirs, self.ours)]
            for opt, other in twins:
                happen(event, which, opt, other, seed)
            count = len(all_params(self.ours))
            layouts = st.lists(st.sampled_from(GRAD_LAYOUTS), min_size=count, max_size=count)
            chosen = data.draw(layouts)
            if self.model.overlap:  # another layout may come into the state
                chosen = ["none" if layout == "none" else "plain" for layout in chosen]
            if self.write_grads:  # to scale one gradient twice is what eager does, and nobody wants
                chosen = ["plain" if layout == "shared" else layout for layout in chosen]
            for opt, _ in twins:
                give_gradients(opt, chosen, seed)
                opt.max_norm = 0.5 if step % 2 else 1e9
            self.step()

    def step(self) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in all_params(self.ours)]
        sizes = [largest(p, p.grad) for p in all_params(self.ours)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", compileclip.FallbackWarning)
            self.ours.step()
        kernels = self.ours._modes.kernels
        if (
            kernels is not None
            and kernels.why_not is not None
            and OPTIMIZERS[self.model.name].roots
        ):
            # 0-dim roots are eager's on both sides.
            self.rough |= not kernels.refused or any(p.dim() for p, _ in kernels.refused)
        with ExactSqrt():
            self.theirs.step()
        self.check(before, sizes)

    def check(self, before: list[Tensor | None], sizes: list[float]) -> None:
        ours, theirs = self.ours, self.theirs
        assert (ours.total_norm is None) == (theirs.total_norm is None)
        assert same(ours.total_norm, theirs.total_norm)
        for p, q, size in zip(all_params(ours), all_params(theirs), sizes, strict=True):
            self.agree("parameter", p, q, size)
            mine, other = ours.state.get(p, {}), theirs.state.get(q, {})
            assert sorted(mine) == sorted(other)
            for name in mine:
                self.agree(name, mine[name], other[name], size)
        grads, others = ([p.grad for p in all_params(opt)] for opt in (ours, theirs))
        if self.write_grads is False:
            assert_same(grads, before, "gradient")
        elif self.write_grads:
            for grad, other, size in zip(grads, others, sizes, strict=True):
                self.agree("gradient", grad, other, size)

    def agree(self, name: str, mine: Any, other: Any, size: float) -> None:
        """To the bit, or closely, and then make it the same."""
        exact = not isinstance(mine, Tensor) or (mine.dtype in EXACT and not self.rough)
        if exact or mine.dim() == 0:
            assert same(mine, other), f"{name} of {self.model.name} differs:\n{mine}\n{other}"
            return
        close = CLOSE[mine.dtype] * max(1.0, size, largest(other))
        if mine.dtype in EXACT:
            torch.testing.assert_close(mine, other, rtol=0, atol=close, equal_nan=True)
            return
        # Where squares underflow, or a state that was replaced cancels them, Adam divides by nearly
        # 0, and one rounding decides on a number, infinity or NaN: so it was for 3 of 16,510
        # elements, and for 1 of 16,385 on what number.
        both = mine.isfinite() & other.isfinite()
        apart = (both & ((mine.double() - other.double()).abs() > close)).sum().item()
        assert apart <= mine.numel() / 1000, f"{name} of {self.model.name}: {apart} differ"
        differ = (mine.isfinite() != other.isfinite()).sum().item()
        assert differ <= 1 + mine.numel() / 1000, f"{name}: {differ} are finite in one only"
        with torch.no_grad():
            mine.copy_(other)


def largest(*tensors: Tensor | None) -> float:
    """The largest absolute value that is finite."""
    found = [t.detach().abs().flatten() for t in tensors if t is not None]
    return max((t[t.isfinite()].max().item() for t in found if t.isfinite().any()), default=0.0)


def test_memory_shared_with_one_that_is_not_served() -> None:
    """Found by fuzzing: served, the second would step first."""
    found = []
    for mode in ("multi_tensor", "eager"):
        whole = torch.nn.Parameter(torch.arange(12.0)[::2])  # with gaps, so it steps in eager mode
        part = torch.nn.Parameter(whole.data[:1])
        opt = compileclip.wrap(ASGD([whole, part], lr=0.1, lambd=0.1), 1.0, mode=mode)
        whole.grad, part.grad = torch.ones(6), torch.full((1,), 2.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", compileclip.FallbackWarning)
            opt.step()
        found.append(whole)
    assert_same(found[:1], found[1:], "parameter")


def test_what_is_not_finite_leaves_the_bound_of_the_rest() -> None:
    """Found by fuzzing: NaN in a gradient, and a last digit in half precision."""
    assert largest(torch.tensor([1.0, math.nan, -9.0, math.inf]), torch.zeros(0), None) == 9.0


def test_every_maker_is_served() -> None:
    """So that it is kernels that are fuzzed."""
    for make in MAKERS.values():
        p = torch.nn.Parameter(torch.randn(5))
        p.grad = torch.randn(5)
        opt = compileclip.wrap(make([p]), 1.0, mode="multi_tensor")
        opt.step()
        assert opt._modes.kernels.why_not is None
        assert [name for name, _ in flat_state(opt)] == sorted(opt.state[p])
