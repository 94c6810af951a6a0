"""The recipe for ignite, and its step under a GradScaler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model, plain

import compileclip

ignite = pytest.importorskip("ignite")
from ignite.engine import Engine, supervised_training_step_amp  # noqa: E402

OVERFLOW = 3


def test_losses_are_those_of_torch() -> None:
    Recipe("ignite").run("make", "train").same_as(*plain())


def test_a_resumed_run_goes_on() -> None:
    losses, norms = plain()
    Recipe("ignite", range(4)).run("make", "train")
    resumed = Recipe("ignite", range(4, 8)).run("make", "load", "train")
    close(resumed.losses, losses[4:])
    close(resumed.norms, norms[4:])


def scaled(wrap: bool, fused: bool) -> tuple[list[int], list[float], float]:
    """The steps after which a hook of the optimizer ran, the losses, and the scale in the end."""
    model = make_model()
    opt: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    opt = compileclip.wrap(opt, MAX_NORM) if wrap else opt

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    if not wrap:
        opt.register_step_pre_hook(clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses: list[float] = []

    def loss_of(output: Any, target: Any) -> Any:
        loss = loss_fn(output, target)
        losses.append(loss.item())
        return loss * (math.inf if len(losses) == OVERFLOW + 1 else 1.0)

    step = supervised_training_step_amp(model, opt, loss_of, "cpu", scaler=scaler)
    called: list[int] = []
    opt.register_step_post_hook(lambda *_: called.append(len(losses) - 1))
    Engine(step).run(batches(), max_epochs=1)
    return called, losses, scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_and_scale_are_those_of_the_bare_optimizer(fused: bool) -> None:
    ours, theirs = scaled(True, fused), scaled(False, fused)
    assert ours[0] == theirs[0] == [s for s in range(8) if fused or s != OVERFLOW]
    assert ours[2] == theirs[2] == 2.0**9
    if not fused:  # a hook clips scaled gradients there
        close(ours[1], theirs[1])
