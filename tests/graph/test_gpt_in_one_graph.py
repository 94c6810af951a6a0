"""A small GPT whose whole training step is one graph, against eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import AdamW, lr_scheduler

import compileclip
from bench.cases.gpt import GPT, GPTConfig, batches, read_text
from compileclip import fallback
from compileclip.fallback import FallbackWarning

STEPS, BATCH, MAX_NORM = 50, 4, 2.0


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(fallback, "_said", set())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Two threads wait for each other in every small kernel where something else takes a core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Training:
    """A GPT, its optimizer and schedule, the same each time."""

    def __init__(self, config: GPTConfig) -> None:
        torch.manual_seed(0)
        self.model = GPT(config)
        adamw = AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer = compileclip.wrap(adamw, MAX_NORM)
        # The learning rate is a float, and beta1 goes down and up again.
        self.scheduler = lr_scheduler.OneCycleLR(
            self.optimizer, 1e-3, total_steps=STEPS, cycle_momentum=True
        )
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, step: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> None:
        self.losses.append(step(*batch))
        assert self.optimizer.total_norm is not None
        self.norms.append(self.optimizer.total_norm)
        self.scheduler.step()


def largest_difference(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(GPTConfig(layers=1, width=32, block=16), id="1 layer"),
        pytest.param(GPTConfig(), id="the demo's size", marks=pytest.mark.sweep),
    ],
)
def test_gpt_in_one_graph_trains_as_in_eager_mode(config: GPTConfig) -> None:
    ours, theirs = (Training(config) for _ in range(2))
    step = compileclip.compile(ours.step)
    drawn = batches(read_text(), config.block, BATCH, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(STEPS):
            batch = next(drawn)
            ours.run(step, batch)
            theirs.run(theirs.step, batch)

    compilations = counters["stats"]["unique_graphs"]
    clipped = sum(norm.item() > MAX_NORM for norm in ours.norms)
    with torch.no_grad():
        loss = largest_difference(ours.losses, theirs.losses)
        ratios = [a / b for a, b in zip(ours.norms, theirs.norms, strict=True)]
        norm = largest_difference(ratios, [torch.ones(())] * STEPS)
        parameter = largest_difference(ours.model.parameters(), theirs.model.parameters())
    print(
        f"{compilations} compilations; {clipped} of {STEPS} steps clipped; largest difference: "
        f"loss {loss:.1e}, norm {norm:.1e} of it, parameter {parameter:.1e}"
    )
    assert not counters["graph_break"]
    assert compilations <= 3
    assert 0 < clipped < STEPS
    # Observed with 1 layer and 9 layers. Most of it is not ours: in a compiled step, torch's too,
    # the bias correction 1 - 0.999**step is a float32, in eager mode a Python float.
    assert loss < 1e-4  # 7e-6, 1.0e-5
    assert norm < 1e-3  # 4e-6, 1.0e-4, that in a step which blows up any rounding
    assert parameter < 1e-5  # 6e-7, 1.1e-6
