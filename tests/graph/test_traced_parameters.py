"""However a training step reaches its parameters, one graph gives the gradients of eager mode."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import flat_state
from test_training_step import MAKERS, counting
from torch import Tensor, nn
from torch._dynamo.utils import counters

import compileclip
from compileclip import fallback
from compileclip.fallback import FallbackWarning

Step = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fallback, "_said", set())


class Run:
    """Two parameters, those of a module and in a list of their own, and their optimizer."""

    def __init__(self, layout: Callable[[Run], Step], name: str = "AdamW", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, False))
        self.params = list(self.model.parameters())
        base = MAKERS[name](self.params)
        self.optimizer = compileclip.wrap(base, 0.1, write_grads=True, **options)
        self.eager = self.step = layout(self)

    def raw(self, x: Tensor) -> Tensor:
        return (x @ self.params[0].t()).tanh() @ self.params[1].t()


def train(ours: Run, theirs: Run, first: int = 0, steps: int = 5) -> None:
    """Steps of both, with another learning rate each, compared in all that they leave."""
    for i in range(first, first + steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i))
        close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours.step(x), theirs.step(x), **close)
        torch.testing.assert_close(ours.optimizer.total_norm, theirs.optimizer.total_norm, **close)
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q, **close)
            assert (p.grad is None) == (q.grad is None)
            torch.testing.assert_close(p.grad, q.grad, **close)
        mine, other = flat_state(ours.optimizer), flat_state(theirs.optimizer)
        assert [name for name, _ in mine] == [name for name, _ in other]
        for (_, a), (_, b) in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, **close)
        for run in (ours, theirs):
            run.optimizer.param_groups[0]["lr"] *= 0.9


def compile_step(run: Run, **options: Any) -> None:
    run.step = compileclip.compile(run.eager, backend=counting([]), **options)


@pytest.fixture
def one_graph() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= 3


def finish(run: Run, loss: Tensor) -> Tensor:
    loss.backward()
    run.optimizer.step()
    return loss.detach()


def zeroes_first(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        run.optimizer.zero_grad()
        return finish(run, run.model(x).square().sum())

    return step


def reads_groups_first(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        count = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
        run.model.zero_grad()
        return finish(run, run.model(x).square().sum() / count)

    return step


def reads_groups_of_the_wrapped(run: Run) -> Step:
    base = run.optimizer.optimizer

    def step(x: Tensor) -> Tensor:
        for group in base.param_groups:
            for p in group["params"]:
                p.grad = None
        return finish(run, run.model(x).square().sum())

    return step


def penalty_first(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in run.params)
        loss = run.model(x).square().sum() + 0.1 * penalty
        loss = finish(run, loss)
        run.optimizer.zero_grad()
        return loss

    return step


def penalty_of_groups(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        groups = run.optimizer.param_groups
        penalty = sum(p.square().sum() for group in groups for p in group["params"])
        run.optimizer.zero_grad()
        return finish(run, run.model(x).square().sum() + 0.1 * penalty)

    return step


def without_module(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        loss = finish(run, run.raw(x).square().sum())
        run.optimizer.zero_grad()
        return loss

    return step


def two_phases(run: Run) -> Step:
    def step(x: Tensor) -> Tensor:
        first = finish(run, run.model[0](x).square().sum())
        run.optimizer.zero_grad()
        second = finish(run, run.model[2](x.repeat(1, 2)[:, :6]).square().sum())
        run.optimizer.zero_grad()
        return first + second

    return step


LAYOUTS = [
    zeroes_first,
    reads_groups_first,
    reads_groups_of_the_wrapped,
    penalty_first,
    penalty_of_groups,
    without_module,
    two_phases,
]


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("name", ["AdamW", "SGD, Nesterov"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_gradients_of_eager(layout: Callable[[Run], Step], name: str) -> None:
    ours, theirs = (Run(layout, name) for _ in range(2))
    compile_step(ours)
    train(ours, theirs)


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("layout", [zeroes_first, without_module])
def test_skip_is_decided_in_the_graph(layout: Callable[[Run], Step]) -> None:
    ours, theirs = (Run(layout, nonfinite="skip") for _ in range(2))
    compile_step(ours)
    train(ours, theirs)


@pytest.mark.parametrize("layout", [zeroes_first, without_module])
def test_marks_that_others_left(layout: Callable[[Run], Step]) -> None:
    """A compiled step of the bare optimizer marks parameters for good, as mode inductor does."""
    ours, theirs = (Run(layout) for _ in range(2))
    for run in (ours, theirs):
        for p in run.params:
            p.grad = torch.ones_like(p)
    torch.compile(ours.optimizer.optimizer.step, backend="aot_eager")()
    theirs.optimizer.optimizer.step()
    assert torch._dynamo.utils.get_static_address_type(ours.params[0]) == "guarded"
    for run in (ours, theirs):
        run.optimizer.zero_grad()
    compile_step(ours, fullgraph=True)
    train(ours, theirs)


@pytest.mark.usefixtures("one_graph")
def test_groups_and_state_that_are_replaced() -> None:
    ours, theirs = (Run(zeroes_first) for _ in range(2))
    compile_step(ours)
    train(ours, theirs, steps=3)
    for run in (ours, theirs):  # new lists and dictionaries
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["param_groups"][0]["lr"] = 0.05
        run.optimizer.load_state_dict(saved)
    train(ours, theirs, first=3, steps=3)


def test_groups_that_are_added_and_copies() -> None:
    ours, theirs = (Run(zeroes_first) for _ in range(2))
    compile_step(ours)
    train(ours, theirs, steps=2)
    for run in (ours, theirs):
        run.model.append(nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            run.model[3].weight.fill_(0.5)
        run.optimizer.add_param_group({"params": [run.model[3].weight], "lr": 0.02})
        run.params.append(run.model[3].weight)
    train(ours, theirs, first=2, steps=2)
    copies = []
    for run in (ours, theirs):
        copied = Run(zeroes_first)
        copied.model, copied.optimizer = copy.deepcopy((run.model, run.optimizer))
        copied.params = list(copied.model.parameters())
        copies.append(copied)
    compile_step(copies[0])
    train(*copies, first=4, steps=2)
    train(ours, theirs, first=4, steps=2)


@pytest.mark.usefixtures("one_graph")
def test_groups_written_in_the_step_stay_as_they_are() -> None:
    def layout(run: Run) -> Step:
        def step(x: Tensor) -> Tensor:
            loss = zeroes_first(run)(x)
            for group in run.optimizer.param_groups:
                group["lr"] = 0.02
            return loss

        return step

    ours, theirs = (Run(layout) for _ in range(2))
    compile_step(ours)
    train(ours, theirs, steps=3)
    ours.step = ours.eager
    train(ours, theirs, first=3, steps=2)
    assert ours.optimizer.param_groups[0]["capturable"] is False


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("name", ["Rprop", "AdamW"])
def test_state_is_made_with_the_first_gradient(name: str) -> None:
    def layout(run: Run) -> Step:
        run.late = False  # type: ignore[attr-defined]

        def step(x: Tensor) -> Tensor:
            run.optimizer.zero_grad()
            hidden = run.model[0](x)
            return finish(run, (run.model[2](hidden) if run.late else hidden).square().sum())

        return step

    ours, theirs = (Run(layout, name) for _ in range(2))
    compile_step(ours)
    train(ours, theirs, steps=2)
    ours.late = theirs.late = True  # type: ignore[attr-defined]
    train(ours, theirs, first=2, steps=3)
