"""Runs the code of docs/trainers.md, and the same training by other means."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

DOCS = Path(__file__).parents[2] / "docs" / "trainers.md"
MAX_NORM = 0.5
STEPS = 8


def blocks(section: str) -> dict[str, str]:
    """The code under a heading of the page, by the word after "python"."""
    parts = re.split(r"^## (.+)\n", DOCS.read_text(), flags=re.M)
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[section]
    return dict(re.findall(r"^```python (\w+)\n(.*?)^```$", text, flags=re.M | re.S))


def sections() -> list[str]:
    return re.findall(r"^## (.+)$", DOCS.read_text(), flags=re.M)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def batches(steps: Iterable[int] = range(STEPS)) -> DataLoader[Any]:
    """Batches, the same for the same step."""
    made = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        made.append([torch.randn(16, n, generator=generator) for n in (6, 2)])
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() * 10


class Recipe:
    """The code of one section, run block by block as a reader would.

    Attributes:
        names: what the code has defined.
        losses: what it logged.
        norms: likewise.
    """

    def __init__(self, section: str, steps: Iterable[int] = range(STEPS), **given: Any) -> None:
        self.blocks = blocks(section)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.names: dict[str, Any] = {
            "model": make_model(),
            "loader": batches(steps),
            "loss_fn": loss_fn,
            "log": self._log,
            **given,
        }

    def run(self, *blocks: str) -> Recipe:
        for name in blocks:
            exec(compile(self.blocks[name], f"{DOCS.name}: {name}", "exec"), self.names)
        return self

    def _log(self, loss: float, total_norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(total_norm)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def same_as(self, losses: list[float], norms: list[float]) -> None:
        """Losses and norms are those of another way to train, within rounding."""
        close(self.losses, losses)
        close(self.norms, norms)
        assert sum(norm > MAX_NORM for norm in norms) > len(norms) // 2


def close(ours: Iterable[float], theirs: Iterable[float], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(
        torch.tensor(list(ours)), torch.tensor(list(theirs)), rtol=rtol, atol=1e-6, equal_nan=True
    )


def plain(
    steps: Iterable[int] = range(STEPS), schedule: bool = True, **options: Any
) -> tuple[list[float], list[float]]:
    """Losses and norms of torch's clip and the bare optimizer in a loop."""
    model = make_model()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9 if schedule else 1.0)
    losses, norms = [], []
    for x, y in batches(steps):
        loss = loss_fn(model(x), y)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        opt.step()
        scheduler.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, norms
