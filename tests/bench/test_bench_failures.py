"""What fails in the benchmark, or computes something else, is said and leaves the rest."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_cases import QUICK, Unclipped, case, row, run

from bench import __main__
from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.measuring import again, measure
from bench.reporting.results import read
from bench.rows import limit, registry
from bench.rows.registry import BASELINE, LIMIT, OURS, Row
from bench.rows.runs import ClipAndStep, Run
from compileclip.native import native_build


class NotStepped(Run):
    """Does nothing."""

    def step(self) -> None:
        pass


class ToNaN(ClipAndStep):
    """Breaks one element."""

    def step(self) -> None:
        super().step()
        self.work.params[-1][0, 0] = math.nan


class OneTensorLess(ClipAndStep):
    """Forgets a parameter."""

    def step(self) -> None:
        self.params[1].grad = None
        super().step()


class HalfTheRate(ClipAndStep):
    """Steps half as far."""

    def step(self) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.5e-3
        super().step()


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [Unclipped, NotStepped, ToNaN, OneTensorLess, HalfTheRate])
def test_a_wrong_row_is_not_timed(wrong: Callable[[Workload], Run], dtypes: str) -> None:
    found = run(case(dtypes=dtypes), Row("wrong", wrong), row(BASELINE))
    assert found["wrong"].status == "wrong"
    assert found["wrong"].reason.startswith("wrong by ")
    assert found["wrong"].median_ms is None
    assert found[BASELINE].status == "ok"  # the row after it starts from the same numbers


class FailsAtStep(ClipAndStep):
    """Raises after a number of steps."""

    def __init__(self, work: Workload, step: int, error: Exception) -> None:
        super().__init__(work)
        self.left, self.error = step, error

    def step(self) -> None:
        if self.left == 0:
            raise self.error
        self.left -= 1
        super().step()


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_row_that_fails_leaves_the_others(step: int) -> None:
    def start(work: Workload) -> Run:
        return FailsAtStep(work, step, ValueError("no\nluck"))

    found = run(case(), Row("fails", start), row(BASELINE))
    assert (found["fails"].status, found["fails"].reason) == ("failed", "ValueError: no")
    assert found["fails"].median_ms is None
    assert found[BASELINE].ratio == 1.0


def test_out_of_memory_is_said() -> None:
    found = run(case(), Row("huge", lambda work: FailsAtStep(work, 0, MemoryError())), row(LIMIT))
    assert found["huge"].reason == "out of memory"
    assert found[LIMIT].status == "ok"


def test_no_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    method = replace(QUICK, compile_tensors=10)
    found = run(case(), row("optax, jax.jit"), method=method)
    assert found["optax, jax.jit"].reason == "jax is not installed"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> None:
        raise native_build.CompilerError("there is no C++ compiler", "install g++")

    monkeypatch.setattr(limit.native_build, "load", missing)
    found = run(case(), row(LIMIT), row(BASELINE))
    assert found[LIMIT].reason == "there is no C++ compiler; install g++"
    assert found[BASELINE].status == "ok"
    assert found[BASELINE].share_of_limit is None


def test_a_mode_that_falls_back_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    for _ in range(2):
        found = run(case(), row(OURS))[OURS]
        assert found.status == "not run"
        assert found.reason == "not served: COMPILECLIP_DISABLE=1 is set"


def test_too_large_and_not_there() -> None:
    with pytest.raises(NotRunError, match=r"needs .* GiB of memory, .* are free"):
        measure.Measurement(case(shapes=((10**13,),)), registry.ROWS, QUICK, Path("/unused"))
    with pytest.raises(NotRunError, match="no device 'cuda:77'"):
        measure.Measurement(case(device="cuda:77"), registry.ROWS, QUICK, Path("/unused"))


@pytest.mark.parametrize("last_words", ["", '{"times": {"clip'])
def test_a_later_process_that_fails(
    last_words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Times of the first stand, and it is said that there are fewer."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{last_words}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(again.sys, "executable", str(program))
    options = ["--shapes", "1x1000", "--rows", "fused,limit", "--repetitions", "4", "--no-plots"]
    options += ["--no-first-steps", "--processes", "2", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 0
    told = capsys.readouterr().err
    assert "fewer times are taken: a process ended early, with exit status 1" in told
    (case,) = read(tmp_path / "step.json").cases
    assert case.row(BASELINE)


def test_cases_and_rows_that_fail_in_a_later_process() -> None:
    method = replace(QUICK, processes=2)
    rows_asked = dict.fromkeys((BASELINE, "clip + foreach"))
    asked = [
        again.Asked(case(device="cuda:77"), rows_asked, method, 600.0),
        again.Asked(case("RMSprop"), rows_asked, method, 600.0),
        again.Asked(case(), rows_asked, method, 600.0),
        again.Asked(case(), rows_asked, method, 0.0),
    ]
    gone, without, fine, late = again.again(asked)
    assert gone.reason.startswith("not run: no device 'cuda:77'")
    assert without.errors == {BASELINE: ("not run", "torch.optim.RMSprop has no fused=True")}
    assert without.times.keys() == {"clip + foreach"}
    assert fine.times.keys() == rows_asked.keys()
    assert not fine.errors
    assert late.reason == "the time is up"
