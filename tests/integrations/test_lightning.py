"""The recipes for Lightning, its own clip, and steps that a GradScaler skips."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model, plain
from torch import nn

import compileclip

lightning = pytest.importorskip("lightning")
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.utilities import disable_possible_user_warnings  # noqa: E402

disable_possible_user_warnings()
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
OVERFLOW = 3


class Seen(lightning.Callback):  # type: ignore[misc, name-defined]
    """Notes what a user sees of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if "total_norm" in trainer.callback_metrics:
            self.norms.append(trainer.callback_metrics["total_norm"].item())


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the trainers of the test show; they print nothing."""
    seen = Seen()
    init = lightning.Trainer.__init__

    def quiet(self: Any, **options: Any) -> None:
        init(self, **{**QUIET, "accelerator": "cpu", "callbacks": [seen], **options})

    monkeypatch.setattr(lightning.Trainer, "__init__", quiet)
    return seen


class Clipping(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Clips by Lightning, or, where that refuses, as Lightning would; or wraps."""

    def __init__(self, wrap: bool, by_hand: bool = False, overflow: bool = False, **options: Any):
        super().__init__()
        self.net: nn.Module = make_model()
        self.wrap, self.by_hand, self.overflow, self.options = wrap, by_hand, overflow, options
        self.before_step: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = loss_fn(self.net(batch[0]), batch[1])
        return loss * math.inf if self.overflow and index == OVERFLOW else loss

    def configure_optimizers(self) -> Any:
        opt = torch.optim.AdamW(self.parameters(), lr=1e-2, **self.options)
        if self.wrap:
            opt = compileclip.wrap(opt, MAX_NORM)  # type: ignore[assignment]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.9)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        self.before_step.append(torch.nn.utils.get_total_norm(grads).item())

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.by_hand:
            torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)
        else:
            super().configure_gradient_clipping(*args, **kwargs)


def fit(module: Any, **options: Any) -> Any:
    lightning.Trainer(max_steps=8, enable_checkpointing=False, **options).fit(module, batches())
    return module


def by_hand(seen: Seen) -> tuple[list[float], list[float]]:
    """Losses and rates of fused AdamW in bf16-mixed, clipped as Lightning refuses to."""
    fit(Clipping(False, by_hand=True, fused=True), precision="bf16-mixed")
    found = seen.losses[:], seen.rates[:]
    seen.__init__()  # type: ignore[misc]
    return found


def test_lightning_refuses_what_the_recipe_does() -> None:
    options = {**QUIET, "accelerator": "cpu", "precision": "bf16-mixed"}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Clipping(False, fused=True), gradient_clip_val=MAX_NORM, **options)


def test_fused_in_bf16_mixed(seen: Seen) -> None:
    losses, rates = by_hand(seen)
    Recipe("Lightning").run("make", "train")
    close(seen.losses, losses)
    assert seen.rates == rates
    assert min(seen.norms) > MAX_NORM
    assert len(seen.norms) == 7  # callbacks come before the module's hook, which logs the norm


def test_a_resumed_run_goes_on(seen: Seen) -> None:
    """As with the bare optimizer; after a stop within an epoch Lightning counts otherwise."""
    for steps, path in ((4, None), (8, "bare.ckpt")):
        trainer = lightning.Trainer(max_steps=steps, precision="bf16-mixed")
        module = Clipping(False, by_hand=True, fused=True)
        trainer.fit(module, batches(range(steps - 4, steps)), ckpt_path=path)
        trainer.save_checkpoint("bare.ckpt")
    losses, rates = seen.losses[:], seen.rates[:]
    seen.__init__()  # type: ignore[misc]
    first = Recipe("Lightning", range(4)).run("make")
    first["trainer"].fit_loop.epoch_loop.max_steps = 4
    first.run("train", "save")
    Recipe("Lightning", range(4, 8)).run("make", "resume")
    close(seen.losses, losses)
    assert seen.rates == rates


def test_manual_optimization(seen: Seen) -> None:
    losses, norms = plain()
    Recipe("Lightning").run("make", "manual", "train")
    close(seen.losses, losses)
    close(seen.norms, norms)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_as_with_lightnings_clip(seen: Seen, overflow: bool) -> None:
    """Unscaled gradients for hooks, skipped steps, rates and scales."""
    found = []
    for wrap in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options = {} if wrap else {"gradient_clip_val": MAX_NORM}
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = fit(Clipping(wrap, overflow=overflow), plugins=plugin, **options)
        opt = module.trainer.optimizers[0]
        steps = [state["step"].item() for state in opt.state.values()]
        found.append((seen.rates[:], steps, scaler.get_scale()))
        found.append((seen.losses[:], module.before_step))
        seen.__init__()  # type: ignore[misc]
    assert found[0] == found[2]
    assert set(found[0][1]) == {8.0 - overflow}
    for ours, theirs in zip(found[3], found[1], strict=True):
        close(ours, theirs, rtol=2e-3)  # float16 autocast


def test_clip_besides_is_told_once(seen: Seen) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Clipping(True), gradient_clip_val=MAX_NORM)
    assert sum("something clips them before" in str(w.message) for w in caught) == 1
    close(seen.losses, plain()[0])


def test_max_norm_is_set_through_lightnings_object(seen: Seen) -> None:
    class Halving(Clipping):
        def on_train_batch_end(self, *_: Any) -> None:
            self.optimizers().max_norm /= 2

    module = fit(Halving(True))
    assert module.trainer.optimizers[0].max_norm == MAX_NORM / 2**8


def test_lightnings_object_can_be_wrapped_without_a_scaler(seen: Seen) -> None:
    class Late(Clipping):
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> Any:
            if index == 0:
                self.late = compileclip.wrap(self.optimizers(), MAX_NORM)
            loss = loss_fn(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            self.late.step()
            self.late.zero_grad()
            self.lr_schedulers().step()
            return loss

    module = Late(False)
    module.automatic_optimization = False
    fit(module)
    close(seen.losses, plain()[0])
    scaled = Late(False)
    scaled.automatic_optimization = False
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="LightningAdamW unscales gradients in its step"):
        fit(scaled, plugins=plugin)
