"""The table mutant_table.py fits the code; ``make mutants`` runs it."""

from __future__ import annotations

from mutant_table import MUTANTS
from mutants import ROOT


def test_each_text_is_there_once() -> None:
    for what, file, old, new, tests in MUTANTS:
        text = (ROOT / "compileclip" / file).read_text()
        assert text.count(old) == 1, f"{what}: {file} has {text.count(old)} times {old!r}"
        assert old != new
        for test in tests.split():
            assert (ROOT / test).exists(), f"{what}: there is no {test}"
