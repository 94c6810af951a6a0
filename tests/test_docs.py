"""What README and the pages in docs/ say runs, and what they point to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import compileclip

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?<!four ranks -->\n\n)(<!-- needs a GPU -->\n\n)?```python\n(.*?)```", re.DOTALL
)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(page: Path, gpu: bool) -> str:
    """The code of a page, which is read from top to bottom; those for a trainer run elsewhere."""
    found = BLOCK.findall(page.read_text())
    return "\n".join(code for needs_gpu, code in found if bool(needs_gpu) == gpu)


def given(device: str = "cpu") -> dict[str, Any]:
    """What a reader has already."""
    model = torch.nn.Linear(4, 4).to(device)

    def forward_and_backward() -> torch.Tensor:
        model.zero_grad()
        loss = model(torch.randn(2, 4, device=device)).square().sum()
        loss.backward()
        return loss.detach()

    loss = model(torch.randn(2, 4, device=device)).sum()
    params = list(model.parameters())
    names = {"torch": torch, "compileclip": compileclip, "model": model, "loss": loss}
    return {**names, "params": params, "forward_and_backward": forward_and_backward}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, gpu=False)], ids=lambda p: p.name)
def test_code_runs(page: Path, tmp_path: Path) -> None:
    file = tmp_path / "code.py"  # Dynamo reads the source of what it traces
    file.write_text(blocks(page, gpu=False))
    exec(compile(file.read_text(), str(file), "exec"), given())


@pytest.mark.gpu
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, gpu=True)], ids=lambda p: p.name)
def test_code_for_a_gpu_runs(page: Path) -> None:
    exec(blocks(page, gpu=True), given("cuda"))
    torch.cuda.synchronize()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [to for to in LINK.findall(page.read_text()) if not (page.parent / to).exists()]
    assert not missing


def test_the_front_page_is_one() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_files_that_are_named_are_there() -> None:
    folders = [ROOT, ROOT / "compileclip", ROOT / "tests", ROOT / "docs"]
    for page in [p for p in PAGES if p.name != "trainers.md"]:  # which names a reader's
        for name in re.findall(r"`([\w/]+\.py)`", page.read_text()):
            there = any((folder / name).exists() for folder in folders)
            assert there or list(ROOT.glob(f"compileclip/**/{name}")), f"{page.name}: {name}"
