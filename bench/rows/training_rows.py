"""The ways to clip and step that are compared in training, by the name of their row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import compileclip

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
WARM_UP = 0.1  # this share of the steps raises the learning rate, the rest lowers it
LOWEST_LR = 0.1  # of the highest


@dataclass(frozen=True)
class Recipe:
    """What all runs have in common in training; ``lr`` is the highest of the schedule."""

    steps: int = 100
    batch: int = 8
    lr: float = 1e-3
    max_norm: float = 1.0


@dataclass
class Update:
    """An optimizer, and one of two functions.

    Attributes:
        clip_and_step: returns the total norm before clipping.
        train_step: trains on a batch of tokens and targets; returns loss and total norm.
    """

    optimizer: Any
    clip_and_step: Callable[[], Tensor] | None = None
    train_step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def _torch(model: nn.Module, recipe: Recipe, compiled: bool = False, fused: bool = False) -> Update:
    """The two calls that torch offers; ``torch.compile`` makes one graph of each."""
    optimizer = _adamw(model, recipe, compiled, fused)
    params = list(model.parameters())

    def clip_and_step() -> Tensor:
        norm = nn.utils.clip_grad_norm_(params, recipe.max_norm)
        optimizer.step()
        return norm

    return Update(optimizer, torch.compile(clip_and_step) if compiled else clip_and_step)


def _compileclip(model: nn.Module, recipe: Recipe, mode: str, fused: bool = False) -> Update:
    """A wrapped ``AdamW``, whose step clips."""
    stock = _adamw(model, recipe, fused=fused)
    optimizer: Any = compileclip.wrap(stock, recipe.max_norm, mode=mode)

    def clip_and_step() -> Tensor:
        optimizer.step()
        norm: Tensor = optimizer.total_norm
        return norm

    return Update(optimizer, clip_and_step)


def _one_graph(model: nn.Module, recipe: Recipe) -> Update:
    """The wrapped ``AdamW`` in a training step that is compiled as one graph."""
    optimizer: Any = compileclip.wrap(_adamw(model, recipe, compiled=True), recipe.max_norm)

    def train_step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # With fullgraph=True, what cannot be compiled is an error, not a step in eager mode.
    compiled = compileclip.compile(train_step, fullgraph=True)
    return Update(optimizer, train_step=lambda x, y: (compiled(x, y), optimizer.total_norm))


REFERENCE = "torch"
BASELINE = "torch, fused"
OURS = "compileclip"
# The mode of "compileclip" is the one that ``"auto"`` takes here.
TRAINING_ROWS: dict[str, Callable[[nn.Module, Recipe], Update]] = {
    REFERENCE: _torch,
    "torch.compile": lambda model, recipe: _torch(model, recipe, compiled=True),
    OURS: lambda model, recipe: _compileclip(model, recipe, "multi_tensor"),
    "compileclip.compile": _one_graph,
    BASELINE: lambda model, recipe: _torch(model, recipe, fused=True),
    "compileclip, eager": lambda model, recipe: _compileclip(model, recipe, "eager", fused=True),
}


def schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A linear warm-up, then a cosine down to ``LOWEST_LR`` of the learning rate."""
    warm_up = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        cosine = math.cos(math.pi * (step - warm_up) / (steps - warm_up))
        return LOWEST_LR + (1 - LOWEST_LR) * (1 + cosine) / 2

    return LambdaLR(optimizer, factor)


def _adamw(
    model: nn.Module, recipe: Recipe, compiled: bool = False, fused: bool = False
) -> Optimizer:
    """Matrices decay; biases and the gains of norms do not."""
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    # As a float, a scheduled learning rate would be compiled into the graph, and once more with
    # its next value.
    lr: Any = torch.tensor(recipe.lr) if compiled else recipe.lr
    return AdamW(groups, lr=lr, betas=BETAS, fused=fused or None)
