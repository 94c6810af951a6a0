"""The recipe for the Trainer of transformers, against its own clip."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from recipes import MAX_NORM, Recipe, batches, close, loss_fn, make_model
from torch import nn

transformers = pytest.importorskip("transformers")


class Model(nn.Module):
    """Returns its loss, as the Trainer asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        return {"loss": loss_fn(self.net(x), labels)}


DATASET = [
    {"x": x, "labels": y} for batch in batches() for x, y in zip(*batch, strict=True)
]  # 128 examples, which the Trainer shuffles


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    init = transformers.TrainingArguments.__init__

    def quiet(self: Any, **options: Any) -> None:
        init(self, use_cpu=True, report_to="none", disable_tqdm=True, **options)

    monkeypatch.setattr(transformers.TrainingArguments, "__init__", quiet)


def recipe() -> Recipe:
    return Recipe("Trainer of transformers", model=Model(), dataset=DATASET)


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def by_its_own_clip(from_class: bool = False) -> Any:
    """The Trainer as in the recipe, with its clip and the bare optimizer."""
    model = Model()
    args = transformers.TrainingArguments(
        output_dir="own",
        max_grad_norm=MAX_NORM,
        per_device_train_batch_size=8,
        max_steps=8,
        logging_steps=1,
        save_strategy="no",
    )
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-2})}
    if not from_class:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
        given = {"optimizers": (opt, transformers.get_linear_schedule_with_warmup(opt, 2, 8))}
    trainer = transformers.Trainer(model, args, train_dataset=DATASET, **given)
    trainer.train()
    return trainer


def test_losses_are_those_of_its_own_clip() -> None:
    ours = recipe().run("make", "train")["trainer"]
    theirs = by_its_own_clip()
    close(logged(ours), logged(theirs))
    close(logged(ours, "total_norm"), logged(theirs, "grad_norm"))
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    assert min(logged(ours, "total_norm")) > MAX_NORM


def test_a_resumed_run_goes_on() -> None:
    straight = recipe().run("make", "train")
    resumed = recipe().run("make", "resume")
    assert resumed["trainer"].state.global_step == 8
    close(logged(resumed["trainer"]), logged(straight["trainer"]))
    close(logged(resumed["trainer"], "total_norm"), logged(straight["trainer"], "total_norm"))
    for a, b in zip(resumed["model"].parameters(), straight["model"].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_optimizer_made_from_a_class() -> None:
    ours = recipe().run("make", "class", "train")["trainer"]
    assert type(ours.optimizer.optimizer).__name__ == "ClippedAdamW"
    close(logged(ours), logged(by_its_own_clip(from_class=True)))


def test_the_trainers_default_clip_besides_is_told_once() -> None:
    ours = recipe().run("make")
    ours["args"].max_grad_norm = MAX_NORM
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.run("train")
    assert sum("something clips them before" in str(w.message) for w in caught) == 1
    close(logged(ours["trainer"], "total_norm"), [MAX_NORM] * 8)
