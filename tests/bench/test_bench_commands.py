"""The benchmark's commands: the files that they write, and options that they refuse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Unclipped, row

from bench import __main__, train
from bench.measuring.environment import ROOT
from bench.plans import _Job as Job
from bench.reporting.results import CaseResult, read
from bench.rows import registry
from bench.rows.registry import BASELINE, OURS, Row
from bench.rows.training_rows import TRAINING_ROWS, Update


def test_step_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "bench_models:tiny", "--shapes", "1x1000"]
    options += ["--device", "cuda:77", "cpu", "--rows", "fused,multi_tensor,limit"]
    options += ["--repetitions", "2", "--warmup", "0", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 0
    out = capsys.readouterr().out
    assert out.count("not run: no device 'cuda:77'") == 2
    report = read(tmp_path / "step.json")
    assert [case.case["shapes"] for case in report.cases[2:]] == ["1x1000", "bench_models:tiny"]
    assert report.cases[3].case["elements"] == 8
    assert all(case.row(OURS) for case in report.cases[2:])
    assert report.environment["versions"]["torch"] == torch.__version__
    assert report.environment["threads"] == torch.get_num_threads()
    assert report.method["repetitions"] == 2


def test_a_wrong_row_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "ROWS", (row(BASELINE), Row("wrong", Unclipped)))
    options = ["--shapes", "1x1000", "--repetitions", "2", "--out", str(tmp_path), "--no-plots"]
    assert __main__.main(["step", *options]) == 1
    out = capsys.readouterr().out
    assert "\nwrong: wrong by " in out
    assert (
        json.loads((tmp_path / "step.json").read_text())["cases"][0]["rows"][1]["status"] == "wrong"
    )


def test_scaling_command(tmp_path: Path) -> None:
    options = ["--tensors", "3", "1", "--sizes", "1e3", "--rows", "fused,multi_tensor,limit"]
    options += ["--repetitions", "2", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["scaling", *options]) == 0
    cases: list[CaseResult] = read(tmp_path / "scaling.json").cases
    assert [c.case["tensors"] for c in cases] == [1, 3, 16]


def test_commands_measured_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases of all commands in one process, then in the next, each with its part."""
    turns: list[int] = []
    measured: list[tuple[int, int]] = []

    def noted(self: Job, turn: int, *args: Any) -> None:
        turns.append(turn)
        measure(self, turn, *args)
        (*_, part) = self._parts
        measured.append((len(self._parts), len(part.times[OURS].device)))

    measure = Job.measure
    monkeypatch.setattr(Job, "measure", noted)
    options = ["--rows", "fused,multi_tensor,limit", "--repetitions", "4", "--seconds", "1e-9"]
    options += ["--no-first-steps", "--out", str(tmp_path)]
    first = ["scaling", "--tensors", "2", "3", "--sizes", *options, "--processes", "2"]
    second = ["step", "--shapes", "1x1000", *options, "--processes", "3"]
    assert __main__.main([*first, "+", *second]) == 0
    assert turns == [0, 0, 0, 1, 1, 1, 2]
    assert measured == [(1, 2)] * 3 + [(2, 2)] * 3 + [(3, 2)]
    assert [c.case["tensors"] for c in read(tmp_path / "scaling.json").cases] == [2, 3]
    (case,) = read(tmp_path / "step.json").cases
    assert case.row(OURS)
    assert (case.processes, case.rounds) == (3, 6)
    assert capsys.readouterr().out.count("Results: ") == 2


def test_what_compiles_finds_its_caches_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that its first steps have filled, and not the user's own."""
    filled: list[set[Path]] = []

    def noted(self: Job, *args: Any) -> None:
        measure(self, *args)
        filled.append(_libraries(self._firsts[OURS].caches))

    measure = Job.measure
    monkeypatch.setattr(Job, "measure", noted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    options = ["--tensors", "1", "--sizes", "--rows", "clip + fused,multi_tensor"]
    options += ["--repetitions", "2", "--seconds", "1e-9", "--processes", "2"]
    assert __main__.main(["scaling", *options, "--out", str(tmp_path)]) == 0
    assert filled[0]
    assert filled[0] == filled[1]
    (case,) = read(tmp_path / "scaling.json").cases
    assert 0 < case.row(OURS).first_warm_s < case.row(OURS).first_cold_s
    assert not _libraries(tmp_path / "own")


def _libraries(folder: Path) -> set[Path]:
    return set(folder.rglob("*.so"))


def test_time_that_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "1x1000", "--minutes", "1e-9", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 1
    assert "not run: the time is up (--minutes 1e-09)" in capsys.readouterr().out


def test_train_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "1", "--width", "32", "--block", "8", "--batch", "2", "--steps", "8"]
    options += ["--rows", "compileclip", "torch, fused", "--out", str(tmp_path)]
    assert __main__.main(["train", *options]) == 0
    (case,) = read(tmp_path / "train.json").cases
    assert [row.name for row in case.rows] == ["torch", "compileclip", "torch, fused"]
    assert all(0 < row.update_ms < row.median_ms for row in case.rows)
    assert "training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "--rows", "nonsense"], "no row's name holds 'nonsense'"),
        (["step", "--shapes", "gpt5"], "invalid choice"),
        (["step", "--repetitions", "0"], "is no integer from 1 on"),
        (["step", "--out", "/proc/nothing"], "cannot write to"),
        (["step", "--model", "bench_models:fails"], "fails failed: RuntimeError: no weights"),
        (["train", "--width", "33"], "33 is no multiple of 32"),
        (["demo", "--seeds", "-1"], "is no integer from 0 on"),
        (["demo", "--max-norm", "0"], "is no positive number"),
        (["scaling", "--sizes", "3"], "is no integer from 16 on"),
        (["train", "--steps", "5"], "is no integer from 6 on"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(options)
    assert message in capsys.readouterr().err


def test_no_row_for_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "1x1000", "--rows", "CUDA graph", "--out", str(tmp_path), "--no-plots"]
    assert __main__.main(["step", *options]) == 1
    assert "not run: none of these rows is for cpu" in capsys.readouterr().out


def test_commands_that_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = ["step", "--shapes", "1x1000", "--out", str(tmp_path)]
    assert __main__.main([*step, "+", *step]) == 1
    assert f"two commands write {tmp_path / 'step.json'}; give" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "demo"])
def test_training_that_cannot_be(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([command, "--device", "cuda:77"]) == 1
    assert capsys.readouterr().out.startswith("not run: no device 'cuda:77'")


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("torch", "compileclip", "torch, fused")
    monkeypatch.setattr(train, "TRAINING_ROWS", names)  # the others compile for long
    options = ["--layers", "1", "--width", "32", "--block", "8", "--batch", "2", "--steps", "15"]
    picture = tmp_path / "new" / "demo.png"
    assert __main__.main(["demo", *options, "--seeds", "3,4", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("compileclip ")]
    assert len(rows) == 2  # one per seed
    assert "seed 3\n" in out
    assert "parameter" in out


def test_a_row_of_training_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(model: Any, recipe: Any) -> Update:
        def clip_and_step() -> torch.Tensor:
            raise RuntimeError("no compiler\nat all")

        return Update(torch.optim.SGD(model.parameters(), lr=0.1), clip_and_step)

    monkeypatch.setitem(TRAINING_ROWS, "compileclip", fails)
    options = ["--layers", "1", "--width", "32", "--block", "8", "--batch", "2", "--steps", "8"]
    options += ["--rows", "compileclip", "torch, fused", "--out", str(tmp_path)]
    assert __main__.main(["train", *options]) == 0
    assert "\ncompileclip: failed: no compiler\n" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_recipe_for_a_gpu_is_a_script_of_nine_minutes() -> None:
    printed = ["make", "--no-print-directory", "-n", "gpu"]
    recipe = subprocess.run(printed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    subprocess.run(["bash", "-n"], input=recipe, text=True, check=True)
    limits = [int(seconds) for seconds in re.findall(r"timeout (?:-s INT )?(\d+) python", recipe)]
    assert len(limits) == len(re.findall(r"python3? -m (?:bench|pytest|pip)", recipe)) == 5
    assert sum(limits) <= 540
