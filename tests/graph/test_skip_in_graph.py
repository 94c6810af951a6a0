"""nonfinite="skip" decided inside a graph, where no host waits for the norm, against eager."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import flat_state
from test_training_step import MAKERS, Training, counting
from torch import Tensor
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from compileclip import fallback
from compileclip.fallback import FallbackWarning
from compileclip.graph import backend

CASES: list[tuple[str, bool | None]] = [(name, None) for name in MAKERS]
CASES += [("AdamW", True), ("AdamW", False), ("SGD", True), ("SGD", False)]
BAD = {0: math.nan, 3: math.inf}  # the first step too, before there is state


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fallback, "_said", set())


def keeping_gradients(run: Training) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        run.model.zero_grad()
        loss = run.model(x).square().sum()
        loss.backward()
        run.optimizer.step()
        return loss.detach()

    return step


def compare(ours: Training, theirs: Training, step: Callable[[Tensor], Tensor]) -> None:
    """Six steps, two of them skipped: parameters, state, norms, gradients."""
    reference = keeping_gradients(theirs)
    # Observed: 2e-6 on Muon, less on the others. With torch 2.11 1.4e-5: a last bit of what Muon
    # orthogonalizes in bfloat16 is 4e-3 of an update of 1.4e-3, in each of four steps.
    muon = isinstance(theirs.optimizer.optimizer, torch.optim.Muon)
    bound = 2e-5 if muon and TorchVersion(torch.__version__) < "2.12" else 1e-5
    for i in range(6):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) * BAD.get(i, 1.0)
        before = [p.detach().clone() for p in ours.model.parameters()]
        step(x)
        reference(x)
        close = {"rtol": 1e-4, "atol": bound, "equal_nan": True}
        pairs = list(zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
        for p, q in pairs:
            torch.testing.assert_close(p, q, **close)
            if ours.optimizer.write_grads is not None:
                torch.testing.assert_close(p.grad, q.grad, **close)
        torch.testing.assert_close(ours.optimizer.total_norm, theirs.optimizer.total_norm, **close)
        mine, other = flat_state(ours.optimizer), flat_state(theirs.optimizer)
        if other:
            assert [name for name, _ in mine] == [name for name, _ in other]
            for (_, a), (_, b) in zip(mine, other, strict=True):
                torch.testing.assert_close(a, b, **close)
        else:  # compiling makes state, as the first step would
            assert all(value == 0 for name, value in mine if name == "step")
        unchanged = all(torch.equal(p, q) for (p, _), q in zip(pairs, before, strict=True))
        assert unchanged == (i in BAD)


@pytest.mark.parametrize(("name", "write_grads"), CASES)
def test_in_a_training_step(name: str, write_grads: bool | None) -> None:
    options: dict[str, Any] = {"nonfinite": "skip", "write_grads": write_grads}
    ours, theirs = (Training(MAKERS[name], **options) for _ in range(2))
    step = torch.compile(keeping_gradients(ours), backend=counting([]), fullgraph=True)
    momentum = name == "SGD, Nesterov"
    if momentum:  # it makes its buffer in the first step that counts
        keeping_gradients(ours)(torch.ones(3, 4))
        keeping_gradients(theirs)(torch.ones(3, 4))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compare(ours, theirs, step)
    assert not counters["graph_break"]


@pytest.mark.parametrize(("name", "write_grads"), CASES)
def test_in_a_compiled_step(
    name: str, write_grads: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "compileclip", counting(graphs := []))
    options: dict[str, Any] = {"nonfinite": "skip", "write_grads": write_grads}
    ours = Training(MAKERS[name], mode="inductor", **options)
    theirs = Training(MAKERS[name], mode="eager", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        compare(ours, theirs, keeping_gradients(ours))
    assert 1 <= len(graphs) <= 3
    targets = [n.target for n in graphs[-1].graph.nodes]
    assert targets.count(torch.ops.compileclip.total_norm.default) == 1  # no norm on the host


def test_momentum_that_the_step_makes_breaks_the_graph_and_says_why() -> None:
    options: dict[str, Any] = {"nonfinite": "skip", "write_grads": True}
    ours, theirs = (Training(MAKERS["SGD, Nesterov"], **options) for _ in range(2))
    from compileclip import compile as compile_step

    step = compile_step(keeping_gradients(ours), backend=counting([]))
    with pytest.warns(FallbackWarning, match=r"graph breaks: nonfinite=.skip. decides on the host"):
        compare(ours, theirs, step)
