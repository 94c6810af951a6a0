"""Generated code is what the files in golden/ hold; ``python tests/golden.py`` renews them."""

from __future__ import annotations

import difflib

import pytest
import torch

pytest.importorskip("triton")
from golden import FOLDER, all_files


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="another torch's operations")
def test_generated_code() -> None:
    found = all_files()
    assert sorted(found) == sorted(path.name for path in FOLDER.iterdir())
    for name, text in found.items():
        before = (FOLDER / name).read_text()
        changes = difflib.unified_diff(before.splitlines(), text.splitlines(), name, "now", n=1)
        assert text == before, "\n".join(changes) + "\nrenew with python tests/golden.py"
