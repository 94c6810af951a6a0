"""The recipe for Fabric, and wrapping what it has made of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model, plain

import compileclip

lightning = pytest.importorskip("lightning")
from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins import MixedPrecision  # noqa: E402


def test_losses_are_those_of_torch() -> None:
    Recipe("Fabric").run("make", "train").same_as(*plain())


def test_a_resumed_run_goes_on() -> None:
    losses, norms = plain()
    Recipe("Fabric", range(4)).run("make", "train", "save")
    resumed = Recipe("Fabric", range(4, 8)).run("make", "load", "train")
    close(resumed.losses, losses[4:])
    close(resumed.norms, norms[4:])


def trained(prepare: Any, precision: Any, clip: bool = False) -> list[float]:
    """Train with what ``prepare`` makes of a Fabric, a model and an optimizer."""
    options: dict[str, Any]
    if precision == "16-mixed":  # which Fabric replaces on a CPU, if it makes it
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}
    else:
        options = {"precision": precision}
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    model = make_model()
    model, opt = prepare(fabric, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for x, y in batches():
        loss = loss_fn(model(x), y)
        fabric.backward(loss)
        if clip:
            fabric.clip_gradients(model, opt, max_norm=MAX_NORM)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def bare(fabric: Any, model: Any, opt: Any) -> Any:
    return fabric.setup(model, opt)


def wrapped_before(fabric: Any, model: Any, opt: Any) -> Any:
    return fabric.setup(model, compileclip.wrap(opt, MAX_NORM))


def wrapped_after(fabric: Any, model: Any, opt: Any) -> Any:
    model, opt = fabric.setup(model, opt)
    return model, compileclip.wrap(opt, MAX_NORM)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_wrapped_before(precision: str) -> None:
    ours = trained(wrapped_before, precision)
    close(ours, trained(bare, precision, clip=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_wrapped_after(precision: str) -> None:
    ours = trained(wrapped_after, precision)
    close(ours, trained(bare, precision, clip=True))


def test_wrapped_after_with_a_scaler() -> None:
    with pytest.raises(ValueError, match="FabricAdamW unscales gradients in its step"):
        trained(wrapped_after, "16-mixed")


def test_max_norm_is_set_through_fabrics_object() -> None:
    recipe = Recipe("Fabric").run("make")
    recipe["opt"].max_norm = 1e-3
    recipe.run("train")
    assert recipe["opt"].optimizer.max_norm == 1e-3
    assert abs(recipe.losses[1] - plain()[0][1]) > 1e-5
