"""The recipe for timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model

pytest.importorskip("timm")
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import NativeScaler


def by_timm() -> list[float]:
    """Losses of timm's own clip."""
    model = make_model()
    opt = create_optimizer_v2(model, opt="adamw", lr=1e-2)
    scheduler = CosineLRScheduler(opt, t_initial=8, t_in_epochs=False)
    scaler = NativeScaler("cpu")
    losses = []
    for step, (x, y) in enumerate(batches()):
        loss = loss_fn(model(x), y)
        scaler(loss, opt, clip_grad=MAX_NORM, parameters=model.parameters())
        opt.zero_grad()
        scheduler.step_update(step + 1)
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_timms_clip() -> None:
    recipe = Recipe("timm").run("make", "train")
    close(recipe.losses, by_timm())
    assert min(recipe.norms) > MAX_NORM


def test_a_resumed_run_goes_on() -> None:
    Recipe("timm", range(4)).run("make", "train", "save")
    resumed = Recipe("timm", range(4, 8)).run("make", "load", "train")
    close(resumed.losses, by_timm()[4:])


def test_an_overflow_is_skipped_as_without_us() -> None:
    recipe: Any = Recipe("timm", range(1)).run("make")
    names = recipe.names
    names["loss_fn"] = lambda output, target: loss_fn(output, target) * torch.inf
    before = [p.detach().clone() for p in names["model"].parameters()]
    scale = names["loss_scaler"].state_dict()["scale"]
    x, y = next(iter(names["loader"]))
    loss = names["loss_fn"](names["model"](x), y)
    names["loss_scaler"](loss, names["opt"], parameters=names["model"].parameters())
    assert names["opt"].total_norm is None
    assert not names["opt"].state
    assert names["loss_scaler"].state_dict()["scale"] == scale / 2
    for a, b in zip(names["model"].parameters(), before, strict=True):
        assert torch.equal(a, b)
