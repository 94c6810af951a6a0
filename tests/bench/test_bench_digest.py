"""``make gpu``: its short table, whatever there is, and its recipe."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import digest
from bench.measuring.environment import ROOT
from bench.reporting.results import CaseResult, Report, RowResult
from bench.rows.registry import BASELINE, LIMIT, OURS, STOCK_GRAPH

GPU = {
    "device": "cuda",
    "device_name": "Some GPU",
    "threads": 2,
    "versions": {},
    "python": "3.12",
    "commit": "abc",
    "date": "today",
}


def write(path: Path, command: str = "step", dtypes: str = "float32", **environment: Any) -> None:
    about: dict[str, Any] = {"shapes": "gpt2", "optimizer": "AdamW", "dtypes": dtypes}
    rows = [
        RowResult(BASELINE, median_ms=1.455, host_us=1937.2, kernels=32),
        RowResult(STOCK_GRAPH, "failed", "out of memory"),
        RowResult(OURS, median_ms=0.945, host_us=725.0, kernels=4),
        RowResult(LIMIT, median_ms=0.9, host_us=60.0),
    ]
    late = CaseResult({**about, "shapes": "resnet50"}, "late", reason="the time is up")
    cases = [CaseResult(about, "a title", rows=rows), late]
    Report(command, {**GPU, **environment}, {}, cases).write(path)


def test_a_line_per_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "gpu" / "step.json")
    write(tmp_path / "gpu" / "step-bfloat16.json", dtypes="bfloat16")
    write(tmp_path / "gpu" / "scaling.json", command="scaling", dtypes="other command")
    write(tmp_path / "cpu" / "step.json", device="cpu", dtypes="other device")
    (tmp_path / "gpu" / "cut.json").write_text('{"command": "st')
    assert digest.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "other" not in out
    assert out.count("Some GPU") == 1
    assert f"not read: {tmp_path / 'gpu' / 'cut.json'} is no result" in out
    (line,) = [line for line in out.splitlines() if line.startswith("GPT-2 small, AdamW, float32")]
    cells = re.split(r"\s{2,}", line.strip())
    expected = ["1.46 / 1,937 / 32", "failed", "0.945 / 725 / 4", "-", "0.900 / 60 / -"]
    assert cells[1:] == expected
    assert "GPT-2 small, AdamW, bfloat16" in out
    assert re.search(r"^ResNet-50, AdamW, float32( +-){5}$", out, re.MULTILINE)


def test_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digest.main([str(tmp_path / "none")]) == 1
    assert capsys.readouterr().out.strip() == "no results"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_recipe_is_a_script_of_nine_minutes() -> None:
    printed = ["make", "--no-print-directory", "-n", "gpu"]
    recipe = subprocess.run(printed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run(["bash", "-n"], input=recipe, text=True, check=True)
    limits = [int(seconds) for seconds in re.findall(r"timeout (?:-s INT )?(\d+) python", recipe)]
    assert len(limits) == len(re.findall(r"python3? -m (?:bench|pytest|pip)", recipe)) == 6
    assert sum(limits) <= 540
    last = [line for line in recipe.splitlines() if "-m" in line][-1]
    assert "bench.digest build/bench" in last


def test_a_file_is_whole_or_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.json"
    write(path)
    before = path.read_text()

    def full(own: Path, text: str) -> None:
        with own.open("w") as file:
            file.write(text[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write(path, dtypes="bfloat16")
    assert path.read_text() == before
