"""What is installed is all of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on


def test_every_folder_is_a_package_of_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "compileclip").rglob("*.py")}
    assert sorted(listed) == sorted([*(".".join(f.parts) for f in folders), "compileclip.passes"])
