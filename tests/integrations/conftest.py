"""What the tests of trainers share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch


def _torchvision_without_operators() -> torch.library.Library | None:
    """Let torchvision be imported beside a torch of another build, as PyPI's beside a CPU-only one.

    timm and torchmetrics import it, and use none of its operators here. Where its compiled part
    cannot be loaded, torchvision fails as it says what two of them do on meta tensors.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


LIBRARY = _torchvision_without_operators()  # before the tests' files import trainers


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes write their checkpoints where they are."""
    monkeypatch.chdir(tmp_path)
