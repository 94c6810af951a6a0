"""The recipe for Accelerate, the order of wrapping, and steps that a GradScaler skips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model, plain

import compileclip

accelerate = pytest.importorskip("accelerate")
OVERFLOW = 3


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def test_losses_are_those_of_torch() -> None:
    Recipe("Accelerate").run("make", "train").same_as(*plain())


def test_a_resumed_run_goes_on() -> None:
    losses, norms = plain()
    Recipe("Accelerate", range(4)).run("make", "train", "save")
    resumed = Recipe("Accelerate", range(4, 8)).run("make", "load", "train")
    close(resumed.losses, losses[4:])
    close(resumed.norms, norms[4:])


def accumulated(wrapped: bool) -> list[float]:
    """Train over two batches a step, with Accelerate's clip or the wrapper."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    opt: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = compileclip.wrap(opt, MAX_NORM) if wrapped else opt
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9)
    model, loader, opt, scheduler = accelerator.prepare(model, batches(), opt, scheduler)
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = loss_fn(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients and not wrapped:
                accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            opt.step()
            scheduler.step()
            opt.zero_grad()
            losses.append(loss.item())
    return [*losses, scheduler.get_last_lr()[0]]


def test_gradient_accumulation() -> None:
    close(accumulated(True), accumulated(False))


def scaled(wrap: bool, fused: bool, **options: Any) -> tuple[list[Any], list[float]]:
    """Train under a GradScaler; what Accelerate says of each step, and the losses."""
    accelerator = accelerate.Accelerator(cpu=True)
    # Accelerate makes one for float16, which it allows on accelerators alone.
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    model = make_model()
    opt: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    opt = compileclip.wrap(opt, MAX_NORM, **options) if wrap else opt
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9)
    model, loader, opt, scheduler = accelerator.prepare(model, batches(), opt, scheduler)
    seen, losses = [], []
    for step, (x, y) in enumerate(loader):
        loss = loss_fn(model(x), y)
        losses.append(loss.item())
        accelerator.backward(loss * (math.inf if step == OVERFLOW else 1.0))
        if not wrap:
            accelerator.scaler.unscale_(opt.optimizer)
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        opt.step()
        scheduler.step()
        opt.zero_grad()
        seen.append((accelerator.optimizer_step_was_skipped, scheduler.get_last_lr()[0]))
    return seen, losses


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_and_schedulers_are_those_of_the_bare_optimizer(
    fused: bool, nonfinite: str
) -> None:
    ours, theirs = scaled(True, fused, nonfinite=nonfinite), scaled(False, fused)
    assert ours[0] == theirs[0]
    assert [skipped for skipped, _ in ours[0]] == [
        step == OVERFLOW and not fused for step in range(8)
    ]
    close(ours[1], theirs[1])


def test_a_step_that_decides_by_itself_counts() -> None:
    """As that of torch's fused optimizers does."""
    ours, theirs = scaled(True, False, nonfinite="skip"), scaled(False, True)
    assert ours[0] == theirs[0]
    close(ours[1], theirs[1])


def test_wrapping_after_prepare_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    _, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"AcceleratedOptimizer stands in front .* wrap the"):
        compileclip.wrap(opt, 1.0)


def test_a_clip_besides_is_told_once() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    opt = compileclip.wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), MAX_NORM)
    model, loader, prepared = accelerator.prepare(model, batches(), opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in loader:
            accelerator.backward(loss_fn(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
            prepared.step()
            prepared.zero_grad()
    assert sum("something clips them before" in str(w.message) for w in caught) == 1
