"""The benchmark's commands: the files that they write, and options that they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Unclipped, row

from bench import __main__, progress, rows
from bench.case import Case
from bench.measure import Measurement
from bench.results import CaseResult, read
from bench.rows import BASELINE, OURS, Row


def test_step_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "bench_models:tiny", "--model", "bench_models:fails"]
    options += ["--shapes", "1x1000"]
    options += ["--device", "cuda:77", "cpu", "--rows", "fused,multi_tensor,limit,optax"]
    options += ["--repetitions", "2", "--warmup", "0", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 0
    out, err = capsys.readouterr()
    assert "not run: bench_models:fails failed: RuntimeError: no weights" in err
    assert out.count("not run: no device 'cuda:77'") == 2
    report = read(tmp_path / "step.json")
    assert [case.case["shapes"] for case in report.cases[2:]] == ["1x1000", "bench_models:tiny"]
    assert report.cases[3].case["elements"] == 8
    assert all(case.row(OURS) for case in report.cases[2:])
    assert report.environment["versions"]["torch"] == torch.__version__
    assert report.environment["threads"] == torch.get_num_threads()
    assert report.method["repetitions"] == 2
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_row_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROWS", (row(BASELINE), Row("wrong", Unclipped)))
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
    assert {p.name for p in tmp_path.glob("*.png")} >= {"scaling-time.png", "scaling-limit.png"}


def test_commands_measured_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of small cases of all commands take turns, before, between and after large ones."""
    order: list[int] = []
    time = Measurement.time

    def recorded(self: Measurement, blocks: int = 1) -> None:
        order.append(self._result.case["tensors"])
        time(self, blocks)

    monkeypatch.setattr(Measurement, "time", recorded)
    monkeypatch.setattr(Case, "is_small", property(lambda case: len(case.shapes) < 3))
    options = ["--rows", "fused,multi_tensor,limit", "--repetitions", "4", "--blocks", "4"]
    options += ["--no-first-steps", "--out", str(tmp_path)]
    first = ["scaling", "--tensors", "2", "3", "--sizes", *options]
    second = ["step", "--shapes", "1x1000", "--seconds", "1e-9", *options]
    assert __main__.main([*first, "+", *second]) == 0
    assert order == [2, 1, 2, 1, 3, 2, 1, 2, 1]
    assert [c.case["tensors"] for c in read(tmp_path / "scaling.json").cases] == [2, 3]
    (case,) = read(tmp_path / "step.json").cases
    assert case.row(OURS)
    assert capsys.readouterr().out.count("Results: ") == 2


def test_what_compiles_is_measured_before_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those that wait would be compiled again before each block."""
    started: list[int] = []
    check = Measurement.__init__

    def recorded(self: Measurement, case: Case, *args: Any) -> None:
        started.append(len(case.shapes))
        check(self, case, *args)

    monkeypatch.setattr(Measurement, "__init__", recorded)
    monkeypatch.setattr(progress, "FEW", 2)  # 3 tensors are many to compile, 4 too many
    options = ["--tensors", "2", "3", "4", "--sizes", "--rows", "fused,one graph", "--no-plots"]
    options += ["--compile-tensors", "3", "--repetitions", "2", "--warmup", "0"]
    options += ["--seconds", "1e-9", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["scaling", *options]) == 0
    assert started == [3, 2, 4]


def test_train_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "1", "--width", "32", "--block", "8", "--batch", "2", "--steps", "8"]
    options += ["--rows", "compileclip", "torch, fused", "--out", str(tmp_path)]
    assert __main__.main(["train", *options]) == 0
    (case,) = read(tmp_path / "train.json").cases
    assert [row.name for row in case.rows] == ["torch", "compileclip", "torch, fused"]
    assert all(0 < row.update_ms < row.median_ms for row in case.rows)
    assert (tmp_path / "train.png").exists()
    assert "training" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "--rows", "nonsense"], "no row's name holds 'nonsense'"),
        (["step", "--shapes", "gpt5"], "invalid choice"),
        (["step", "--repetitions", "0"], "is no integer from 1 on"),
        (["step", "--out", "/proc/nothing"], "cannot write to"),
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


def test_commands_that_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = ["step", "--shapes", "1x1000", "--out", str(tmp_path)]
    assert __main__.main([*step, "+", *step]) == 1
    assert f"two commands write {tmp_path / 'step.json'}; give" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--device", "cuda:77"], ["--width", "33"]])
def test_training_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["train", *options]) == 1
    assert capsys.readouterr().out.startswith("not run: ")
