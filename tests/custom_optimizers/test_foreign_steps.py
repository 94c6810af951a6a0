"""Steps of other classes than torch's that ask for more than a parameter's numbers.

Each steps as it would bare, with clipping before: parameters, state and groups.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_optimizers import Foreign
from helpers import assert_same, clone_params, set_grads
from test_foreign_optimizers import flat
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import compileclip

# Of two groups, the last two in the second; three of the first are checked in a first use anyway.
SHAPES = [(64, 4), (4,), (2, 3, 2), (6,), (2, 2, 3, 3), (5,)]
Change = Callable[[Optimizer, int], None]


class Scaled(Foreign):
    """The learning rate is multiplied by what ``scale`` makes of optimizer, group and parameter."""

    scale: Any = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * type(self).scale(self, i, p))


def scaled(scale: Callable[[Any, int, Any], float]) -> type[Scaled]:
    return type("Made", (Scaled,), {"scale": staticmethod(scale)})


class Counted(Foreign):
    """Counts steps in each group, with or without gradients (schedule-free, AdaBelief)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        for group in self.param_groups:
            group["k"] = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad, alpha=-group["lr"] / group["k"])


class CountedInTheFirst(Counted):
    """Counts in the first group alone."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.param_groups[0]["k"] += 1
        return Foreign.step(self)

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(grad, alpha=-group["lr"] / self.param_groups[0]["k"])


class CountedByParameters(Counted):
    """Counts what it has stepped."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return Foreign.step(self)

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        group["k"] += 1
        p.add_(grad, alpha=-group["lr"] / group["k"])


class OnlyCounts(CountedByParameters):
    """The same, for whoever reads it."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        group["k"] += 1
        p.add_(grad, alpha=-group["lr"])


class CountedInState(Foreign):
    """Numbers in the state, of which a user may add some."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        state["n"] = state.get("n", 0) + 1
        p.add_(grad, alpha=-group["lr"] / state["n"] * state.get("scale", 1.0))


class MakesState(Foreign):
    """Its ``_init_group`` counts, and takes something else than lists."""

    def _init_group(self, group: Any, value: float = 0.5) -> None:
        for p in group["params"]:
            state = self.state[p]
            state.setdefault("momentum", torch.full_like(p, value))
            state["n"] = state.get("n", 0) + 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            self._init_group(group)
        return super().step()

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        state["momentum"].mul_(0.9).add_(grad)
        p.add_(state["momentum"], alpha=-group["lr"] / state["n"])


class CountingAdam(Adam):
    """torch's step over a function of its own."""

    def _init_group(self, group: Any, *lists: Any) -> Any:
        group["n"] = group.get("n", 0) + 1
        return super()._init_group(group, *lists)


class BecomesTensor(Foreign):
    """A number in the state that becomes a tensor."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        kept = state.setdefault("buffer", 0.0)
        state["buffer"] = grad.clone() if isinstance(kept, float) and kept else kept + 1
        p.add_(grad, alpha=-group["lr"])


def rates(opt: Optimizer, step: int) -> None:
    for i, group in enumerate(opt.param_groups):
        group["lr"] = 0.1 / (1 + step + i)


def frozen(index: int) -> Change:
    """The group's gradients are missing in the first three steps."""

    def change(opt: Optimizer, step: int) -> None:
        for p in opt.param_groups[index]["params"] if step < 3 else ():
            p.grad = None

    return change


def left_over(opt: Optimizer, step: int) -> None:
    opt.param_groups[0]["params"][0].requires_grad_(step < 2)


def numbers(opt: Optimizer, step: int) -> None:
    state = opt.state[opt.param_groups[1]["params"][0]]
    if step == 3:
        state["n"] = 0
    if step == 5:
        state["scale"] = 0.0


def attribute(opt: Optimizer, step: int) -> None:
    if step == 2:
        opt.param_groups[0]["params"][1].rate = 0.5  # type: ignore[attr-defined]


def nothing(opt: Optimizer, step: int) -> None:
    pass


def first_of_many(params: list[Any], p: Any) -> float:
    return 0.5 if len(params) > 3 and p is params[0] else 1.0


def chance() -> float:
    return torch.rand(()).item()


DEPENDS = {
    "aspect ratio": lambda opt, i, p: max(1, p.size(0) / p.size(-1)) ** 0.5,
    "dimensions": lambda opt, i, p: 0.5 if p.ndim == 4 else 1.0,
    "size": lambda opt, i, p: 0.5 if p.numel() > 100 else 1.0,
    "index of the group": lambda opt, i, p: [1.0, 0.1][i],
    "rates of others": lambda opt, i, p: max(g["lr"] for g in opt.param_groups),
    "identity": lambda opt, i, p: opt.scales.get(id(p), 1.0),
    "place": lambda opt, i, p: 1.0 if p is opt.param_groups[i]["params"][0] else 0.5,
    "first of many": lambda opt, i, p: first_of_many(opt.param_groups[i]["params"], p),
    "chance": lambda opt, i, p: random.random(),
    "chance at times": lambda opt, i, p: 1.0 if opt.param_groups[0]["lr"] > 0.04 else chance(),
}
CASES = [
    *(pytest.param(scaled(f), rates, id=name) for name, f in DEPENDS.items()),
    pytest.param(scaled(lambda opt, i, p: float(p.requires_grad)), left_over, id="left over"),
    pytest.param(scaled(lambda opt, i, p: getattr(p, "rate", 1.0)), attribute, id="attribute"),
    pytest.param(CountedInState, numbers, id="numbers that a user writes"),
    pytest.param(MakesState, nothing, id="another _init_group"),
    pytest.param(CountingAdam, nothing, id="another _init_group of Adam"),
    pytest.param(BecomesTensor, nothing, id="a number that becomes a tensor"),
    *(
        pytest.param(cls, change, id=f"{cls.__name__}, {name}")
        for cls in (Counted, CountedInTheFirst, CountedByParameters, OnlyCounts)
        for name, change in (("first", frozen(0)), ("second", frozen(1)), ("none", nothing))
    ),
]


def made(cls: Any, params: list[Any]) -> Any:
    opt = cls([{"params": params[:4]}, {"params": params[4:], "lr": 0.05}])
    if getattr(cls, "scale", None) is DEPENDS["identity"]:
        opt.scales = {id(params[1]): 0.25}
    return opt


@pytest.mark.parametrize(("cls", "change"), CASES)
def test_as_bare(cls: Any, change: Change) -> None:
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    others = clone_params(params)
    ours, theirs = compileclip.wrap(made(cls, params), 1.0), made(cls, others)
    for step in range(7):
        for opt, tensors in ((ours, params), (theirs, others)):
            set_grads(tensors, step)
            change(opt, step)
        for draw in (random.seed, torch.manual_seed):
            draw(step)
        ours.step()
        for draw in (random.seed, torch.manual_seed):
            draw(step)
        norm = compileclip.clip_grad_norm_(others, 1.0)
        theirs.step()
        assert_same([ours.total_norm], [norm], "norm")
        if issubclass(cls, Adam):  # ATen's roots are not correctly rounded
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        else:
            assert_same(params, others, "parameter")
            mine, other = (flat(list(opt.state.values())) for opt in (ours, theirs))
            assert_same(mine, other, "state")
        for mine, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert {k: v for k, v in mine.items() if k != "params"} == {
                k: v for k, v in other.items() if k != "params"
            }


@pytest.mark.parametrize("cls", [Counted, CountedInTheFirst, scaled(DEPENDS["rates of others"])])
def test_served(cls: Any) -> None:
    """What groups hold is seen, and no reason to go eager."""
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    opt = compileclip.wrap(made(cls, params), 1.0)
    for step in range(3):
        set_grads(params, step)
        frozen(1)(opt, step)
        opt.step()
        assert opt._modes.kernels is not None
        assert opt._modes.kernels.why_not is None


def test_many_groups_of_another_class() -> None:
    """Each bucket's step would look at each group."""
    groups = [{"params": [nn.Parameter(torch.ones(3))], "lr": 0.1 * i} for i in range(1, 40)]
    for group in groups:
        group["params"][0].grad = torch.ones(3)
    counted = compileclip.wrap(Counted([dict(group) for group in groups]), 1.0)
    counted.step()
    assert "there are 39 groups" in counted.explain()


def test_hooks_of_a_step_within_the_step() -> None:
    """They see parameters, no stand-ins of these."""
    shapes: list[Any] = []

    class Inner(CountingAdam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return super().step()

    params = [nn.Parameter(torch.ones(7, 7))]
    inner = Inner(params)
    inner.register_step_pre_hook(
        lambda opt, *_: shapes.append(opt.param_groups[0]["params"][0].shape)
    )
    opt = compileclip.wrap(inner, 1.0)
    for _ in range(2):
        params[0].grad = torch.ones(7, 7)
        opt.step()
    assert set(shapes) == {(7, 7)}
    assert "may run hooks" in opt.explain()
