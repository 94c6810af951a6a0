"""README shows what the committed results hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.results import CaseResult, Report, RowResult
from bench.rows import BASELINE, OURS

TEXT = """# A title
before
<!-- bench:step -->
old numbers
<!-- /bench -->
between
<!-- bench:train -->
<!-- /bench -->
"""
ENVIRONMENT = {
    "device": "cpu",
    "device_name": "Some CPU",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "python": "3.11.7",
    "commit": "abc",
    "date": "2026-01-01",
}


def case(shapes: str = "gpt2", optimizer: str = "AdamW", ours: float = 50.0) -> CaseResult:
    about: dict[str, Any] = {
        "shapes": shapes,
        "optimizer": optimizer,
        "dtypes": "float32",
        "tensors": 148,
        "elements": 1000,
    }
    rows = [
        RowResult(BASELINE, median_ms=100.0, ratio=1.0, lower_ms=90, upper_ms=110),
        RowResult(OURS, median_ms=ours, ratio=2.0, update_ms=5.0, share_of_limit=0.9),
        RowResult("optax, jax.jit", status="not run", reason="jax is not installed"),
        RowResult("clip + foreach", status="wrong", reason="wrong by 1"),
    ]
    return CaseResult(about, "a title", 32.0, rows=rows)


def write(folder: Path, command: str, *cases: CaseResult) -> None:
    report = Report(command, ENVIRONMENT, {"repetitions": 30}, list(cases))
    report.write(folder / "some-cpu" / f"{command}.json")


def test_readme_shows_what_the_files_hold() -> None:
    text = readme.README.read_text()
    assert readme.render(text, readme.RESULTS) == text, "run python -m bench.readme"
    commands = {found.group(2) for found in readme.BLOCK.finditer(text)}
    kept = [readme.read(path).command for path in readme.RESULTS.glob("*/*.json")]
    assert set(kept) <= commands, "README has no <!-- bench:... --> for some results"


def test_blocks_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "step", case(), case("1x1000", ours=0.25))
    text = readme.render(TEXT, tmp_path)
    assert "old numbers" not in text
    assert text.startswith("# A title\nbefore\n<!-- bench:step -->\n")
    assert "<!-- /bench -->\nbetween\n<!-- bench:train -->\n\nNo results yet.\n" in text
    assert readme.render(text, tmp_path) == text
    assert "Some CPU, 2 threads, torch 2.13.0, Python 3.11.7, commit abc, 2026-01-01" in text
    lines = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert lines[0] == ["AdamW, float32", "GPT-2 small", "1 of 1,000"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells[OURS] == ["50.00 (2.00)", "0.250 (2.00)"]
    assert cells["clip + foreach"] == ["wrong", "wrong"]
    assert "optax, jax.jit" not in cells


def test_rounds_and_processes_are_those_that_count(tmp_path: Path) -> None:
    first, second = case(), case("1x1000")
    first.rounds, first.processes = 42, 7
    second.rounds, second.processes = 840, 6
    write(tmp_path, "step", first, second)
    text = readme.render(TEXT, tmp_path)
    assert "; medians of at least 42, in turns, in at least 6 processes; " in text


def test_several_optimizers_are_rows(tmp_path: Path) -> None:
    write(tmp_path, "step", case(), case(optimizer="SGD", ours=20.0))
    text = readme.render(TEXT, tmp_path)
    assert "100.0 / 50.00 = 2.00" in text
    assert "100.0 / 20.00 = 5.00" in text


def test_training_and_scaling(tmp_path: Path) -> None:
    write(tmp_path, "train", case())
    write(tmp_path, "scaling", case())
    text = readme.render("<!-- bench:scaling -->\n<!-- /bench -->\n" + TEXT, tmp_path)
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [OURS, "50.00", "-", "2.00", "5.00", "10%"] in cells
    assert ["148", "1,000", "100.0", "50.00", "2.00", "90%", "-", "-"] in cells


@pytest.mark.parametrize(
    ("text", "content"), [("<!-- bench:nonsense -->\n<!-- /bench -->", None), (TEXT, '{"a": 1}')]
)
def test_what_is_not_as_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, content: str | None
) -> None:
    file = tmp_path / "README.md"
    file.write_text(text)
    if content is not None:
        (tmp_path / "device").mkdir()
        (tmp_path / "device" / "step.json").write_text(content)
    assert readme.main(["--readme", str(file), "--results", str(tmp_path)]) == 1
    assert file.read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_check_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    write(tmp_path, "step", case())
    options = ["--readme", str(file), "--results", str(tmp_path)]
    assert readme.main([*options, "--check"]) == 1
    assert file.read_text() == TEXT
    assert readme.main(options) == 0
    assert readme.main([*options, "--check"]) == 0
    assert "50.00 (2.00)" in file.read_text()
