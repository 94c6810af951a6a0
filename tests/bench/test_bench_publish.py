"""docs/benchmarks.md shows what the committed results hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import __main__, publish
from bench.measuring.environment import device_type
from bench.reporting.results import CaseResult, Report, RowResult
from bench.rows.registry import BASELINE, OURS

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
        RowResult("torch.compile, two calls", status="not run", reason="it takes long"),
        RowResult("clip + foreach", status="wrong", reason="wrong by 1"),
    ]
    return CaseResult(about, "a title", 32.0, rows=rows)


def write(folder: Path, command: str, *cases: CaseResult, device: str = "cpu") -> None:
    where = {**ENVIRONMENT, "device": device, "device_name": f"Some {device}"}
    report = Report(command, where, {"repetitions": 30}, list(cases))
    report.write(folder / f"some-{device}" / f"{command}.json")


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if "|" in line]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines]


def on_gpu(*cases: CaseResult) -> list[CaseResult]:
    """As the GPU's method has it: the host by itself."""
    for each in cases:
        each.host_hidden, each.rounds = True, 30
        for row, host in zip(each.rows, (2000.0, 500.0), strict=False):
            row.host_us, row.host_ratio = host, 2000.0 / host
    return list(cases)


def test_the_page_shows_what_the_files_hold() -> None:
    text = publish.PAGE.read_text()
    assert publish.render(text, publish.RESULTS) == text, "run python -m bench.publish"
    commands = {found.group(2, 3) for found in publish.BLOCK.finditer(text)}
    kept = [publish.read(path) for path in publish.RESULTS.glob("*/*.json")]
    assert {(r.command, device_type(r.environment)) for r in kept} <= commands, (
        "the page has no <!-- bench:... --> for some results"
    )


def test_blocks_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, "step", case(), case("1x1000", ours=0.25))
    text = publish.render(TEXT, tmp_path)
    assert "old numbers" not in text
    assert text.startswith("# A title\nbefore\n<!-- bench:step -->\n")
    assert "<!-- /bench -->\nbetween\n<!-- bench:train -->\n\nNo results yet.\n" in text
    assert publish.render(text, tmp_path) == text
    assert "Some cpu, 2 threads, torch 2.13.0, Python 3.11.7, commit abc, 2026-01-01" in text
    lines = cells_of(text)
    assert lines[0] == ["AdamW, float32", "GPT-2 small", "1 of 1,000"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells[OURS] == ["50.00 (2.00)", "0.250 (2.00)"]
    assert cells["clip + foreach"] == ["wrong", "wrong"]
    assert "torch.compile, two calls" not in cells


def test_rounds_and_processes_are_those_that_count(tmp_path: Path) -> None:
    first, second = case(), case("1x1000")
    first.rounds, first.processes = 42, 7
    second.rounds, second.processes = 840, 6
    write(tmp_path, "step", first, second)
    text = publish.render(TEXT, tmp_path)
    assert "; medians of at least 42, in turns, in at least 6 processes; " in text


def test_several_optimizers_are_rows(tmp_path: Path) -> None:
    write(tmp_path, "step", case(), case(optimizer="SGD", ours=20.0))
    text = publish.render(TEXT, tmp_path)
    assert "100.0 / 50.00 = 2.00" in text
    assert "100.0 / 20.00 = 5.00" in text


def test_a_gpu_has_two_columns_per_case(tmp_path: Path) -> None:
    write(tmp_path, "step", *on_gpu(case(), case("1x1000")), device="cuda")
    write(tmp_path, "scaling", *on_gpu(case()), device="cuda")
    text = publish.render("<!-- bench:scaling -->\n<!-- /bench -->\n" + TEXT, tmp_path)
    lines = cells_of(text)
    times = ["GPT-2 small, GPU ms", "host µs", "1 of 1,000, GPU ms", "host µs"]
    assert ["AdamW, float32", *times] in lines
    assert [OURS, *["50.00 (2.00)", "500 (4.00)"] * 2] in lines
    assert ["clip + foreach", *["wrong", publish.NOTHING] * 2] in lines
    found = ["100.0", "2,000", "50.00", "500", "2.00", "4.00", "90%"]
    assert ["148", "1,000", *found, "-", "-"] in lines
    assert "GPU, times as fast" in text


def test_files_from_before_the_host_was_timed_apart() -> None:
    (path,) = publish.RESULTS.glob("amd*/step.json")
    report = publish.read(path)
    assert not any(each.host_hidden for each in report.cases)
    assert all(row.host_ratio is None for each in report.cases for row in each.rows)
    assert all(each.row(OURS) for each in report.cases)


def test_a_block_for_a_kind_of_device(tmp_path: Path) -> None:
    write(tmp_path, "step", case())
    write(tmp_path, "step", *on_gpu(case()), device="cuda")
    blocks = [f"<!-- bench:step{kind} -->\n<!-- /bench -->\n" for kind in (" cuda", " cpu", "")]
    gpu, cpu, both = (publish.render(block, tmp_path) for block in blocks)
    assert "Some cuda" in gpu
    assert "Some cpu" not in gpu
    assert "Some cpu" in cpu
    assert "Some cuda" not in cpu
    assert "Some cpu" in both
    assert "Some cuda" in both


@pytest.mark.parametrize(("ratio", "said"), [(1.25, "20.0 % less"), (0.8, "25.0 % more")])
def test_training_in_a_sentence(tmp_path: Path, ratio: float, said: str) -> None:
    trained = case()
    trained.rows.append(RowResult("compileclip", median_ms=80.0, ratio=ratio))
    write(tmp_path, "train", trained)
    text = publish.render(TEXT, tmp_path)
    assert f"\n\nIn all, training took {said} time with compileclip than with torch, fused." in text


def test_training_and_scaling(tmp_path: Path) -> None:
    write(tmp_path, "train", case())
    write(tmp_path, "scaling", case())
    text = publish.render("<!-- bench:scaling -->\n<!-- /bench -->\n" + TEXT, tmp_path)
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
    assert __main__.main(["publish", "--page", str(file), "--results", str(tmp_path)]) == 1
    assert file.read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(TEXT)
    write(tmp_path, "step", case())
    assert __main__.main(["publish", "--page", str(file), "--results", str(tmp_path)]) == 0
    assert "50.00 (2.00)" in file.read_text()


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "step", case())
    (path,) = tmp_path.glob("*/step.json")
    before = path.read_text()

    def full(own: Path, text: str) -> None:
        with own.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, "step", case("1x1000"))
    assert path.read_text() == before
