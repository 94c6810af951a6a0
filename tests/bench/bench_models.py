"""What the benchmark's ``--model`` can name: a model, and what is none."""

from __future__ import annotations

import torch


def fails() -> None:
    raise RuntimeError("no weights")


def exits() -> None:
    raise SystemExit(3)


def tiny() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def number() -> int:
    return 5


def frozen() -> list[torch.Tensor]:
    return [torch.zeros(3)]
