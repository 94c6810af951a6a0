"""Optimizers that LightningCLI and Hydra make from a class in a file of settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from recipes import batches, close, loss_fn, make_model, plain

import compileclip

MODULE = "import torch, compileclip\nClippedAdamW = compileclip.clipped(torch.optim.AdamW, 0.5)\n"


@pytest.fixture(autouse=True)
def _my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)


@pytest.mark.filterwarnings("ignore")
def test_lightning_cli() -> None:
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    losses: list[float] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = make_model()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = loss_fn(self.net(batch[0]), batch[1])
            losses.append(loss.item())
            return loss

        def train_dataloader(self) -> Any:
            return batches()

    Path("config.yaml").write_text(
        "trainer: {max_steps: 8, accelerator: cpu, enable_checkpointing: false,\n"
        "  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: run}},\n"
        "  enable_progress_bar: false, enable_model_summary: false}\n"
        "optimizer: {class_path: my_module.ClippedAdamW, init_args: {lr: 0.01}}\n"
    )
    cli = LightningCLI(Module, args=["fit", "--config", "config.yaml"])
    (opt,) = cli.trainer.optimizers
    assert isinstance(opt, compileclip.ClippedOptimizer)
    assert opt.param_groups[0]["lr"] == 0.01
    close(losses, plain(schedule=False)[0])
    (saved,) = Path("run").rglob("config.yaml")
    assert "class_path: my_module.ClippedAdamW" in saved.read_text()


def test_hydra() -> None:
    pytest.importorskip("hydra")
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create({"_target_": "my_module.ClippedAdamW", "lr": 0.01})
    model = make_model()
    opt = instantiate(config, params=model.parameters())
    assert isinstance(opt, compileclip.ClippedOptimizer)
    losses = []
    for x, y in batches():
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    close(losses, plain(schedule=False)[0])
