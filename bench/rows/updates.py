"""The ways to clip and step that the demo compares, by the name of their row."""

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
    """An optimizer, and ``clip_and_step``, which returns the total norm before clipping."""

    optimizer: Optimizer
    clip_and_step: Callable[[], Tensor]


@dataclass
class TrainingStep:
    """An optimizer, and ``run``, which trains on a batch and returns loss and total norm."""

    optimizer: Optimizer
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def torch_update(model: nn.Module, recipe: Recipe, **options: Any) -> Update:
    """The two calls that torch offers; ``options`` are passed to ``AdamW``."""
    optimizer = AdamW(_groups(model), **{"lr": recipe.lr, "betas": BETAS, **options})
    params = list(model.parameters())

    def clip_and_step() -> Tensor:
        norm = nn.utils.clip_grad_norm_(params, recipe.max_norm)
        optimizer.step()
        return norm

    return Update(optimizer, clip_and_step)


def compiled_update(model: nn.Module, recipe: Recipe) -> Update:
    """The two calls under ``torch.compile``, which compiles them as one graph each."""
    # As a float, a scheduled learning rate would be compiled into the graph, and once more with
    # its next value.
    update = torch_update(model, recipe, lr=torch.tensor(recipe.lr))
    return Update(update.optimizer, torch.compile(update.clip_and_step))


def compileclip_update(
    model: nn.Module, recipe: Recipe, mode: str = "multi_tensor", **options: Any
) -> Update:
    """A wrapped ``AdamW``, whose step clips; ``options`` are passed to ``AdamW``.

    The mode is the one that ``"auto"`` takes for it.
    """
    adamw = AdamW(_groups(model), lr=recipe.lr, betas=BETAS, **options)
    optimizer = compileclip.wrap(adamw, recipe.max_norm, mode=mode)

    def clip_and_step() -> Tensor:
        optimizer.step()
        assert optimizer.total_norm is not None
        return optimizer.total_norm

    return Update(optimizer, clip_and_step)


def compiled_training_step(model: nn.Module, recipe: Recipe) -> TrainingStep:
    """The wrapped ``AdamW`` in a training step that is compiled as one graph."""
    # As a float, a scheduled learning rate would be compiled twice: as a number, then as any.
    adamw = AdamW(_groups(model), lr=torch.tensor(recipe.lr), betas=BETAS)
    optimizer = compileclip.wrap(adamw, recipe.max_norm)

    def train_step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # With fullgraph=True, what cannot be compiled is an error, not a step in eager mode.
    compiled = compileclip.compile(train_step, fullgraph=True)

    def run(tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss = compiled(tokens, targets)
        assert optimizer.total_norm is not None
        return loss, optimizer.total_norm

    return TrainingStep(optimizer, run)


REFERENCE = "torch"
COMPILED = "torch.compile"
ONE_GRAPH = "compileclip.compile"
UPDATES: dict[str, Callable[[nn.Module, Recipe], Update | TrainingStep]] = {
    REFERENCE: torch_update,
    COMPILED: compiled_update,
    "compileclip": compileclip_update,
    ONE_GRAPH: compiled_training_step,
    "torch, fused": lambda model, recipe: torch_update(model, recipe, fused=True),
    "compileclip, eager": lambda model, recipe: compileclip_update(
        model, recipe, mode="eager", fused=True
    ),
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


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay; biases and the gains of norms do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
