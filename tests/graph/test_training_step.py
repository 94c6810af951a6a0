"""compileclip.compile: a whole training step as one graph, against eager."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same
from optimizer_registry import ONE_GRAPH, OPTIMIZERS, makers, names
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler

import compileclip
from compileclip import fallback
from compileclip.fallback import FallbackWarning
from compileclip.passes.lift_scalars import LiftScalars

MAKERS = makers([*names(lambda entry: entry.is_plain), "SGD, Nesterov"], lr=0.01)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fallback, "_said", set())


class Training:
    """A model and wrapped optimizers, the same each time."""

    def __init__(self, make: Callable[[Any], Any], max_norm: float = 0.1, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False)
        )
        self.optimizer = compileclip.wrap(make(self.model.parameters()), max_norm, **options)
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def step(self, x: Tensor) -> Tensor:
        loss = self.model(x).square().sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, step: Callable[[Tensor], Tensor], i: int) -> None:
        self.losses.append(step(torch.randn(3, 4, generator=torch.Generator().manual_seed(i))))
        assert self.optimizer.total_norm is not None
        self.norms.append(self.optimizer.total_norm.clone())


def assert_close_runs(ours: Training, theirs: Training, tolerance: float = ONE_GRAPH) -> None:
    # Forward and backward are compiled too, so their rounding differs.
    for a, b in ((ours.losses, theirs.losses), (ours.norms, theirs.norms)):
        torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=tolerance, atol=1e-6)
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def counting(graphs: list[Any]) -> Callable[..., Any]:
    """A backend that keeps the graphs and takes them apart as AOTAutograd does, to run in eager."""

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        LiftScalars()(module.graph)
        module.recompile()
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(module, inputs)

    return backend


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimizer_is_one_graph(name: str) -> None:
    ours, theirs = (Training(MAKERS[name]) for _ in range(2))
    graphs: list[Any] = []
    step = compileclip.compile(ours.step, backend=counting(graphs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for i in range(8):
            ours.run(step, i)
            theirs.run(theirs.step, i)
            for opt in (ours.optimizer, theirs.optimizer):
                opt.param_groups[0]["lr"] *= 0.9
                opt.max_norm *= 0.95
    assert not counters["graph_break"]
    compilations = counters["stats"]["unique_graphs"]
    # SGD makes its momentum buffer in the first step, whose graph is another one.
    assert compilations <= (3 if name in ("SGD, Nesterov", "Rprop") else 2), compilations
    assert_close_runs(ours, theirs, OPTIMIZERS[name].one_graph)
    assert ours.norms[0] > 0.1
    targets = [n.target for n in graphs[-1].graph.nodes]
    assert targets.count(torch.ops.compileclip.total_norm) == 1


def test_inductor_compiles_it() -> None:
    ours, theirs = (Training(MAKERS["AdamW"]) for _ in range(2))
    step = compileclip.compile(ours.step)
    for i in range(6):
        ours.run(step, i)
        theirs.run(theirs.step, i)
    assert not counters["graph_break"]
    assert_close_runs(ours, theirs)
    assert all(p.grad is None for p in ours.model.parameters())
    saved = ours.optimizer.state_dict()["state"]
    assert [s["step"].item() for s in saved.values()] == [6.0, 6.0]


def test_schedulers_accumulation_frozen_parameters_and_two_optimizers() -> None:
    def build(compiled: bool) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        model[0].bias.requires_grad_(False)
        a = compileclip.wrap(torch.optim.AdamW(model[0].parameters(), lr=0.01), 0.1)
        b = compileclip.wrap(
            torch.optim.SGD(model[2].parameters(), lr=0.1), 0.2, norm_type=math.inf
        )

        def step(x: Tensor) -> Tensor:
            for part in x.chunk(2):
                loss = model(part).square().sum()
                loss.backward()
            a.step()
            b.step()
            model.zero_grad()
            return loss.detach()

        graphs: list[Any] = []
        if compiled:
            step = compileclip.compile(step, backend=counting(graphs))
        schedulers = [lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (a, b)]
        losses = []
        for i in range(6):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(i))
            losses.append(step(x))
            for s in schedulers:
                s.step()
        return torch.stack(losses), list(model.parameters()), [a.total_norm, b.total_norm]

    ours, theirs = build(True), build(False)
    assert not counters["graph_break"]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write_grads", [True, False])
def test_gradients_kept_after_the_step(write_grads: bool) -> None:
    ours, theirs = (Training(MAKERS["SGD"], write_grads=write_grads) for _ in range(2))

    def keeping(run: Training) -> Callable[[Tensor], Tensor]:
        def step(x: Tensor) -> Tensor:
            run.model.zero_grad()
            loss = run.model(x).square().sum()
            loss.backward()
            run.optimizer.step()
            return loss.detach()

        return step

    compiled = compileclip.compile(keeping(ours), backend=counting([]))
    for i in range(4):
        ours.run(compiled, i)
        theirs.run(keeping(theirs), i)
        for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert_close_runs(ours, theirs)


def test_plain_torch_compile_is_right() -> None:
    """Without compileclip.compile, backward() breaks the graph; clip and update are compiled."""
    ours, theirs = (Training(MAKERS["AdamW"]) for _ in range(2))
    step = torch.compile(ours.step, backend=counting([]))
    for i in range(5):
        ours.run(step, i)
        theirs.run(theirs.step, i)
    assert_close_runs(ours, theirs)


def test_what_decides_on_the_host_breaks_the_graph_and_says_so() -> None:
    ours, theirs = (Training(MAKERS["AdamW"], nonfinite="raise") for _ in range(2))
    step = compileclip.compile(ours.step, backend=counting([]))
    with pytest.warns(FallbackWarning, match=r"falls back to graph breaks: nonfinite=.raise."):
        ours.run(step, 0)
    theirs.run(theirs.step, 0)
    for i in range(1, 4):
        ours.run(step, i)
        theirs.run(theirs.step, i)
    assert_close_runs(ours, theirs)
    before = [p.detach().clone() for p in ours.model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        step(torch.full((3, 4), math.nan))
    assert_same(ours.model.parameters(), before, "parameter")


@pytest.mark.parametrize("name", ["AdamW", "SGD, Nesterov"])
def test_betas_and_momentum_that_change_at_every_step(name: str) -> None:
    ours, theirs = (Training(MAKERS[name]) for _ in range(2))
    step = compileclip.compile(ours.step, backend=counting(graphs := []))
    schedulers = [
        lr_scheduler.OneCycleLR(t.optimizer, 0.05, total_steps=20) for t in (ours, theirs)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for i in range(12):
            ours.run(step, i)
            theirs.run(theirs.step, i)
            for s in schedulers:
                s.step()
    assert counters["stats"]["unique_graphs"] <= 3
    assert len(graphs) >= 2
    assert_close_runs(ours, theirs)


def test_a_later_graph_that_fails_to_compile_does_not_run_the_step_twice() -> None:
    ours, theirs = (Training(MAKERS["AdamW"], nonfinite="raise") for _ in range(2))

    def with_sine(run: Training) -> Callable[[Tensor], Tensor]:
        return lambda x: run.step(x).sin()

    def backend(module: Any, inputs: Any) -> Any:
        if any("sin" in str(node.target) for node in module.graph.nodes):
            raise RuntimeError("no sines")
        return module.forward

    compiled = compileclip.compile(with_sine(ours), backend=backend)
    for i in range(4):
        ours.run(compiled, i)
        theirs.run(with_sine(theirs), i)
    assert_close_runs(ours, theirs)
    assert [s["step"].item() for s in ours.optimizer.state.values()] == [4.0, 4.0]


def test_what_cannot_be_compiled_at_all_runs_in_eager_mode() -> None:
    ours, theirs = (Training(MAKERS["AdamW"]) for _ in range(2))

    def backend(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no backend today")

    step = compileclip.compile(ours.step, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        for i in range(3):
            ours.run(step, i)
            theirs.run(theirs.step, i)
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == 1
    assert "no backend today" in messages[0]
    assert_close_runs(ours, theirs)
    # An error that the eager step itself meets in what else it compiled is the user's to see.
    ours.optimizer.register_step_pre_hook(
        torch.compile(lambda *_: torch.ones(1) + 1, backend=backend)
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        step(torch.zeros(3, 4))


def test_demanded_full_graph_is_an_error_where_there_is_none() -> None:
    training = Training(MAKERS["AdamW"], nonfinite="raise")
    step = compileclip.compile(training.step, backend=counting([]), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        training.run(step, 0)


def test_errors_of_the_users_own_come_through() -> None:
    def step(x: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise ValueError("three")
        return x

    with pytest.raises(ValueError, match="three"):
        compileclip.compile(step, backend=counting([]))(torch.zeros(3))


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    training, graphs = Training(MAKERS["AdamW"]), []
    step = compileclip.compile(training.step, backend=counting(graphs))
    training.run(step, 0)
    assert not graphs
