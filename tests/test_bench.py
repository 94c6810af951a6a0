"""The benchmark: its rows compute what they should, and what fails is said and leaves the rest."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__, limit, measure, rows, shapes
from bench.case import Case, NotRunError
from bench.first_step import first_steps
from bench.measure import Method
from bench.results import CaseResult, RowResult, read
from bench.rows import BASELINE, LIMIT, OURS, Row
from bench.runs import ClipAndStep, Run
from bench.timing import MOST, Clock, interleave, summarize
from bench.workload import Workload
from compileclip.lowering import native

SHAPES = ((8, 4), (3,), (70, 130))
QUICK = Method(repetitions=2, seconds=0.0, warmup=1, compile_tensors=0, first_steps=False)


def case(
    optimizer: str = "AdamW", dtypes: str = "float32", shapes: Any = SHAPES, device: str = "cpu"
) -> Case:
    return Case("tiny", shapes, optimizer, dtypes, device)


def run(case: Case, *chosen: Row, method: Method = QUICK) -> dict[str, RowResult]:
    result = measure.measure(case, chosen or rows.ROWS, method, Path("/unused"))
    return {row.name: row for row in result.rows}


def row(name: str) -> Row:
    return next(row for row in rows.ROWS if row.name == name)


def not_compiled(found: dict[str, RowResult]) -> dict[str, RowResult]:
    """Without the rows that ``QUICK`` leaves out."""
    for name, result in list(found.items()):
        if row(name).per_tensor:
            assert result.status == "not run"
            assert "--compile-tensors 0" in found.pop(name).reason
    return found


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_every_row(dtypes: str) -> None:
    found = not_compiled(run(case(dtypes=dtypes)))
    for name, result in found.items():
        if name == "optax, jax.jit" and result.status == "not run":
            assert result.reason == "jax is not installed"
            continue
        assert result.status == "ok", (name, result.reason)
        assert result.median_ms > 0
        assert result.lower_ms <= result.median_ms <= result.upper_ms
        assert result.host_us > 0
        assert result.share_of_limit > 0
        if name != LIMIT:
            assert 0 < result.difference < (1e-7 if dtypes == "float32" else 1e-3)
            assert name == "optax, jax.jit" or result.extra_bytes >= 0
    # Copies of two gradients of 70 x 130 at once, as foreach computes with lists.
    assert found["clip + foreach"].extra_bytes >= 70 * 130 * (4 if dtypes == "float32" else 2)
    assert found[BASELINE].ratio == found[LIMIT].share_of_limit == 1.0
    assert found[LIMIT].bytes_per_parameter == (32 if dtypes == "float32" else 16)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam"])
def test_every_optimizer(optimizer: str) -> None:
    found = not_compiled(run(case(optimizer)))
    reasons = {r.name: r.reason for r in found.values() if r.status != "ok"}
    expected = {"optax, jax.jit": "this row is for AdamW, with parameters and state of one dtype"}
    if optimizer in ("RMSprop", "NAdam", "RAdam"):
        without = f"torch.optim.{optimizer} has no fused=True"
        expected |= {BASELINE: without, "fused, grad_scale by hand": without}
    assert reasons == expected


def test_float32_state_of_bfloat16() -> None:
    found = not_compiled(run(case("SGD", "bfloat16+float32")))
    assert found["clip + for-loop"].status == "ok"
    assert found[LIMIT].bytes_per_parameter == 16
    found = run(
        case("AdamW", "bfloat16+float32"), row("clip + for-loop"), row(BASELINE), row(LIMIT)
    )
    assert found["clip + for-loop"].reason.startswith("RuntimeError: expected dtype float")
    assert found[BASELINE].status == "failed"
    assert found[LIMIT].status == "ok"


def _compiled(name: str) -> None:
    method = Method(repetitions=2, seconds=0.0, warmup=1, compile_tensors=1, first_steps=False)
    found = run(case(shapes=((16, 8),)), row(name), row(BASELINE), method=method)
    assert found[name].status == "ok", found[name].reason
    assert found[name].ratio > 0


def test_one_graph() -> None:
    _compiled("torch.compile, one graph")


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["torch.compile, two calls", "compileclip, inductor"])
def test_compiled(name: str) -> None:
    _compiled(name)


class Unclipped(ClipAndStep):
    """Clips nothing."""

    def step(self) -> None:
        self.optimizer.step()


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
    found = run(case(), row("optax, jax.jit"))
    assert found["optax, jax.jit"].reason == "jax is not installed"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(source: str) -> None:
        raise native.CompilerError("there is no C++ compiler", "install g++")

    monkeypatch.setattr(limit.native, "load", missing)
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
        measure.measure(case(shapes=((10**13,),)), rows.ROWS, QUICK, Path("/unused"))
    with pytest.raises(NotRunError, match="no device 'cuda:77'"):
        measure.measure(case(device="cuda:77"), rows.ROWS, QUICK, Path("/unused"))


def test_reference_is_a_plain_run_in_float64() -> None:
    work = Workload(case("NAdam", shapes=((3,), (), (4, 5))))
    params = [torch.nn.Parameter(p.double()) for p in work.params]
    optimizer = work.case.recipe.make(params, foreach=False)
    work.load(optimizer, params)
    for state in optimizer.state.values():
        state.update({k: v.double() for k, v in state.items() if k != "step"})
    norms = []
    for factor in work.trajectory.factors:
        for p, grad in zip(params, work.new_grads(factor), strict=True):
            p.grad = grad.double()
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
    assert norms[0] > 1
    assert norms[1] == pytest.approx(0.5)
    for i, p in enumerate(params):
        torch.testing.assert_close(
            work.trajectory.reference(i).param, p.detach(), rtol=1e-13, atol=0
        )
    found = work.difference([p.detach() for p in params], [{} for _ in params])
    assert found.relative < 1e-13


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16+float32"])
def test_the_limit_changes_nothing(dtypes: str) -> None:
    work = Workload(case(dtypes=dtypes, shapes=((4097,), (3,), (100, 999))))
    before = [p.clone() for p in [*work.params, *[v for s in work.state for v in s.values()]]]
    kernel = limit.Limit(work)
    kernel.prepare(work.new_grads())
    kernel.step()
    after = [*work.params, *[v for s in work.state for v in s.values()]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_runs_take_turns() -> None:
    taken: list[str] = []

    class Noted(Run):
        def __init__(self, work: Workload, name: str) -> None:
            super().__init__(work)
            self.name = name

        def step(self) -> None:
            assert all(p.grad is not None for p in self.params)
            taken.append(self.name)

    work = Workload(case())
    runs: dict[str, Run] = {name: Noted(work, name) for name in "abc"}
    times, errors = interleave(runs, Clock(torch.device("cpu"), cold=True), 6, 2)
    rounds = [taken[i : i + 3] for i in range(0, len(taken), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    assert [len(t.device) for t in times.values()] == [6, 6, 6]
    assert not errors
    times, _ = interleave(runs, Clock(torch.device("cpu"), cold=False), 6, 2, seconds=60.0)
    assert [len(t.host) for t in times.values()] == [MOST * 6] * 3


def test_median_and_quartiles() -> None:
    found = summarize([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found.lower, found.median, found.upper) == (2.0, 3.0, 4.0)
    assert summarize([7.0]).upper == 7.0


def test_first_steps_are_cold_then_warm(tmp_path: Path) -> None:
    cold, warm = first_steps(case(shapes=((5,),)), OURS, tmp_path, 120.0)
    assert cold is not None
    assert warm is not None
    assert warm < cold
    assert list(tmp_path.rglob("*.so"))
    assert first_steps(case(), OURS, tmp_path, 0.01) == (None, None)


def test_lists_of_shapes() -> None:
    sizes = {name: sum(map(math.prod, make())) for name, make in shapes.SHAPES.items()}
    assert sizes == {
        "gpt2": 124_439_808,
        "gpt2-xl": 1_557_611_200,
        "llama-1b": 1_235_814_400,
        "vit-b": 86_567_656,
        "resnet50": 25_557_032,
        "2000x32x32": 2_048_000,
        "64x1024x1024": 67_108_864,
        "1x1000": 1_000,
    }


def fails() -> None:
    raise RuntimeError("no weights")


def exits() -> None:
    raise SystemExit(3)


def tiny() -> torch.nn.Module:
    return torch.nn.Linear(3, 2)


def number() -> int:
    return 5


def frozen() -> list[torch.Tensor]:
    return [torch.zeros(3)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "is not module:function"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("test_bench:no_such", "AttributeError"),
        ("test_bench:fails", "RuntimeError: no weights"),
        ("test_bench:exits", "SystemExit"),
        ("test_bench:number", "returned int"),
        ("test_bench:frozen", "no parameter that requires a gradient"),
    ],
)
def test_model_that_fails(spec: str, message: str) -> None:
    with pytest.raises(shapes.ModelError, match=message):
        shapes.of_model(spec)


def test_step_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "test_bench:tiny", "--model", "test_bench:fails", "--shapes", "1x1000"]
    options += ["--device", "cuda:77", "cpu", "--rows", "fused,multi_tensor,limit,optax"]
    options += ["--repetitions", "2", "--warmup", "0", "--no-first-steps", "--out", str(tmp_path)]
    assert __main__.main(["step", *options]) == 0
    out, err = capsys.readouterr()
    assert "not run: test_bench:fails failed: RuntimeError: no weights" in err
    assert out.count("not run: no device 'cuda:77'") == 2
    report = read(tmp_path / "step.json")
    assert [case.case["shapes"] for case in report.cases[2:]] == ["1x1000", "test_bench:tiny"]
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


@pytest.mark.parametrize("options", [["--device", "cuda:77"], ["--width", "33"]])
def test_training_that_cannot_be(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["train", *options]) == 1
    assert capsys.readouterr().out.startswith("not run: ")
