"""The benchmark's commands: the files that they write, and options that they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import Unclipped, row

from bench import __main__
from bench.measuring import again, timing
from bench.measuring.again import Asked, Found
from bench.measuring.measure import Measurement
from bench.measuring.timing import Times
from bench.reporting import progress
from bench.reporting.results import CaseResult, read
from bench.rows import registry
from bench.rows.registry import BASELINE, OURS, Row


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
    assert {p.name for p in tmp_path.glob("*.png")} >= {"scaling-time.png", "scaling-limit.png"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """With one thread no cores lie apart, for which there would be further processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_commands_measured_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases of all commands in one process, then in the next, each with its part."""
    asked: list[list[Asked]] = []
    taken: dict[str, list[int]] = {}
    add = Measurement.add

    def recorded(self: Measurement, times: dict[str, Times], errors: Any) -> None:
        taken.setdefault(self._result.title, []).append(len(times[OURS].device))
        add(self, times, errors)

    def noted(these: list[Asked]) -> Iterator[Found]:
        asked.append(these)
        return again.again(these)

    monkeypatch.setattr(Measurement, "add", recorded)
    monkeypatch.setattr(progress, "again", noted)
    options = ["--rows", "fused,multi_tensor,limit", "--repetitions", "4", "--seconds", "1e-9"]
    options += ["--no-first-steps", "--out", str(tmp_path)]
    first = ["scaling", "--tensors", "2", "3", "--sizes", *options, "--processes", "2"]
    second = ["step", "--shapes", "1x1000", *options, "--processes", "3"]
    assert __main__.main([*first, "+", *second]) == 0
    assert [[len(each.case.shapes) for each in these] for these in asked] == [[2, 3, 1], [1]]
    assert list(taken.values()) == [[2, 2], [2, 2], [2, 2, 2]]
    assert [c.case["tensors"] for c in read(tmp_path / "scaling.json").cases] == [2, 3]
    (case,) = read(tmp_path / "step.json").cases
    assert case.row(OURS)
    assert capsys.readouterr().out.count("Results: ") == 2


@pytest.mark.usefixtures("one_thread")
def test_what_compiles_finds_its_caches_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that its first steps have filled, and not the user's own."""
    asked: list[Asked] = []

    def noted(these: list[Asked]) -> Iterator[Found]:
        asked.extend(these)
        filled = [_libraries(each.rows[OURS]) for each in these]
        yield from again.again(these)
        assert all(filled)
        assert [_libraries(each.rows[OURS]) for each in these] == filled

    monkeypatch.setattr(progress, "again", noted)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    options = ["--tensors", "1", "2", "--sizes", "--rows", "clip + fused,multi_tensor"]
    options += ["--repetitions", "2", "--seconds", "1e-9", "--processes", "2", "--no-plots"]
    assert __main__.main(["scaling", *options, "--out", str(tmp_path)]) == 0
    assert [each.rows[BASELINE] for each in asked] == [None, None]
    assert all(case.row(OURS) for case in read(tmp_path / "scaling.json").cases)
    assert not _libraries(tmp_path / "own")


def _libraries(folder: Path | None) -> set[Path]:
    assert folder is not None
    return set(folder.rglob("*.so"))


@pytest.mark.parametrize(("latency", "more"), [(20.0, 2), (200.0, 4)])
def test_processes_in_place_of_those_whose_cores_lay_apart(
    latency: float, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is followed by another, up to as many again but one."""
    processes: list[int] = []

    def faked(asked: list[Asked]) -> Iterator[Found]:
        processes.append(len(asked))
        times = Times([1.0] * 3, [1.0] * 3, [latency, 20.0, latency])
        return iter([Found({BASELINE: times}, {})] * len(asked))

    monkeypatch.setattr(timing, "core_latency", lambda device: latency)
    monkeypatch.setattr(progress, "again", faked)
    options = ["--shapes", "1x1000", "--rows", "clip + fused", "--repetitions", "6", "--no-plots"]
    options += ["--seconds", "1e-9", "--processes", "3", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 0
    assert processes == [1] * more


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


def test_no_row_for_the_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--shapes", "1x1000", "--rows", "CUDA graph", "--out", str(tmp_path), "--no-plots"]
    assert __main__.main(["step", *options]) == 1
    assert "not run: none of these rows is for cpu" in capsys.readouterr().out


def test_commands_that_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = ["step", "--shapes", "1x1000", "--out", str(tmp_path)]
    assert __main__.main([*step, "+", *step]) == 1
    assert f"two commands write {tmp_path / 'step.json'}; give" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--device", "cuda:77"], ["--width", "33"]])
def test_training_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["train", *options]) == 1
    assert capsys.readouterr().out.startswith("not run: ")
