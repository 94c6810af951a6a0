"""The code of docs/distributed.md, from top to bottom on four ranks."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compileclip

PAGE = Path(__file__).parent.parent.parent / "docs" / "distributed.md"
BLOCK = re.compile(r"<!-- on four ranks -->\n\n```python\n(.*?)```", re.DOTALL)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def batch() -> Tensor:
    return torch.randn(5, 4)


def check_page() -> list[int]:
    warnings.simplefilter("ignore")
    given: dict[str, Any] = {"torch": torch, "compileclip": compileclip, "device": "cpu"}
    given |= {"make_model": make_model, "batch": batch, "model": make_model()}
    modes = []
    for code in BLOCK.findall(PAGE.read_text()):
        exec(code, given)
        opt = given["opt"]
        assert opt.total_norm is None or opt.total_norm.isfinite()
        if opt._modes.kernels is not None:
            assert opt._modes.kernels.why_not is None, code
            modes.append(len(opt._modes.kernels.refused))
    return modes


def test_code_runs(on_ranks: Any) -> None:
    assert PAGE.read_text().count("```python") == len(BLOCK.findall(PAGE.read_text()))
    modes = on_ranks(4, check_page)[0]
    assert len(modes) >= 5
