"""Measure the rows of a case: each is checked first, then they are timed in turns."""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.cases.case import Case, NotRunError
from bench.cases.workload import CLOSE, Workload, check_fits
from bench.measuring.conclude import Part, conclude
from bench.measuring.first_step import first_steps, use_caches
from bench.measuring.gpu_timing import clock_for
from bench.measuring.profile import profile_step
from bench.measuring.timing import Times, interleave, synchronize
from bench.reporting.results import CaseResult, RowResult
from bench.rows.registry import LIMIT, Row, check_compilation
from bench.rows.runs import Run


@dataclass(frozen=True)
class Method:
    """How to measure.

    Attributes:
        repetitions: timed steps per row, at least.
        seconds: more steps are timed until all rows together took so long.
        processes: among how many processes these are divided, all cases in one, then in the next.
            For a part in which the cores lay apart another process takes one more, up to as many
            again but one. What compiles does so in each, with filled caches on disk.
        warmup: steps before them, in each process; in the first besides the two of the check.
        cold: whether caches are flushed before each step; else new gradients were just written.
        compile_tensors: rows compiled tensor by tensor run up to so many.
        first_steps: whether first steps are timed, in fresh processes.
        first_step_limit: seconds that one of these may take.
    """

    repetitions: int = 30
    seconds: float = 3.0
    processes: int = 1
    warmup: int = 5
    cold: bool = False
    compile_tensors: int = 200
    first_steps: bool = True
    first_step_limit: float = 600.0


class Measurement:
    """The rows of a case, checked and ready to be timed.

    Attributes:
        apart: whether the cores lay apart in most rounds of the last part of the times.
    """

    apart = False

    def __init__(
        self,
        case: Case,
        chosen: Sequence[Row],
        method: Method,
        caches: Path,
        on_progress: Callable[[str], object] = lambda what: None,
    ) -> None:
        """Check ``chosen`` rows of ``case``; a row that fails leaves the others alone.

        Args:
            case: the work.
            chosen: the rows.
            method: how.
            caches: a folder for the caches of rows that compile; what runs afterwards in this
                process may use them.
            on_progress: told what is being done.

        Raises:
            NotRunError: the case cannot be measured at all.
        """
        check_fits(case)
        self._method, self._tell = method, on_progress
        hidden = torch.device(case.device).type == "cuda"
        self._result = CaseResult(case.to_json(), case.title, host_hidden=hidden)
        self._result.rows = [RowResult(row.name) for row in chosen]
        pairs = list(zip(chosen, self._result.rows, strict=True))
        self._folders: dict[str, Path] = {}
        # Before this process takes memory, of which the others need as much.
        for row, found in pairs:
            if method.first_steps and row.compiles and _may_run(row, case, method):
                on_progress(f"first steps of {row.name}")
                self._folders[row.name] = folder = Path(tempfile.mkdtemp(dir=caches))
                times = first_steps(case, row.name, folder, method.first_step_limit)
                found.first_cold_s, found.first_warm_s = times
        on_progress("tensors")
        work = Workload(case)
        self._result.bytes_per_parameter = work.needed_bytes / case.elements
        self._runs: dict[str, Run] = {}
        self._parts: list[Part] = []
        forget_compiled([row for row in chosen if _may_run(row, case, method)])
        for row, found in pairs:
            on_progress(f"check of {row.name}")
            with use_caches(self._folders.get(row.name)):  # filled already
                run = _checked(row, work, method, found)
            if run is not None:
                self._runs[row.name] = run

    @property
    def rows(self) -> dict[str, Path | None]:
        """The rows that have not failed, each with its caches, as ``again.Asked`` has them."""
        ok = [row.name for row in self._result.rows if row.status == "ok"]
        return {name: self._folders.get(name) for name in ok}

    def time(self) -> None:
        """Take this process's part of the times, and let the tensors go."""
        rounds, tell = itertools.count(1), self._tell
        if self._runs:
            tell("round 1")
            self.add(*take_times(self._runs, self._method, lambda: tell(f"round {next(rounds)}")))
            _profile({name: self._runs[name] for name in self.rows}, self._result, tell)
        self._runs.clear()
        empty_caches()

    def add(self, times: dict[str, Times], errors: dict[str, tuple[str, str]]) -> None:
        """Take in what ``take_times`` returned here or elsewhere."""
        self.apart = any(len(more.apart) > len(more.near) for more in times.values())
        for name, error in errors.items():
            next(row for row in self._result.rows if row.name == name).fail(*error)
        self._parts += [times] if times else []

    def finish(self) -> CaseResult:
        """What was found."""
        failed = {row.name for row in self._result.rows} - self.rows.keys()
        parts = [{n: t for n, t in part.items() if n not in failed} for part in self._parts]
        conclude(self._result, [part for part in parts if part])
        return self._result


def take_times(
    runs: dict[str, Run], method: Method, on_round: Callable[[], object] = lambda: None
) -> tuple[dict[str, Times], dict[str, tuple[str, str]]]:
    """Take one process's part of the times of ``runs``.

    Returns:
        The times; the status and reason of those that failed.
    """
    times, errors = interleave(
        runs,
        clock_for(next(iter(runs.values())).work.params[0].device, method.cold),
        -(-method.repetitions // method.processes),
        method.warmup,
        method.seconds / method.processes,
        on_round,
    )
    return times, {name: explain(error) for name, error in errors.items()}


def forget_compiled(chosen: Sequence[Row]) -> None:
    """Make another case no recompilation, of which there may be a few only."""
    if any(row.per_tensor for row in chosen):
        torch.compiler.reset()


def _may_run(row: Row, case: Case, method: Method) -> bool:
    try:
        check_compilation(row, len(case.shapes), method.compile_tensors)
    except NotRunError:
        return False
    return True


def _checked(row: Row, work: Workload, method: Method, found: RowResult) -> Run | None:
    """The run of ``row``, after the steps of the check; None if it fails, which ``found`` tells."""
    try:
        check_compilation(row, len(work.params), method.compile_tensors)
        work.reset()
        start = time.perf_counter()
        run = row.start(work)
        making = time.perf_counter() - start
        seconds = [_seconds(run, work.new_grads(factor)) for factor in work.trajectory.factors]
        difference = run.difference()
    except Exception as error:
        found.fail(*explain(error))
        return None
    if difference is None:
        return run
    if method.first_steps and not row.compiles:
        found.first_cold_s = found.first_warm_s = making + seconds[0]
    found.difference = difference.absolute
    if difference.relative > CLOSE[work.case.dtype]:
        found.fail("wrong", f"wrong by {difference.relative:.1e} in {difference.of}")
        return None
    return run


def _seconds(run: Run, grads: Sequence[Tensor]) -> float:
    """Take a step with ``grads``, and say how long it took until its end."""
    device = run.work.params[0].device
    run.prepare(grads)
    synchronize(device)
    start = time.perf_counter()
    run.step()
    synchronize(device)
    seconds = time.perf_counter() - start
    run.release()
    return seconds


def explain(error: Exception) -> tuple[str, str]:
    """The status and the reason of a row that ``error`` ended."""
    reason = " ".join(str(error).strip().partition("\n")[0].split())[:200]
    if isinstance(error, NotRunError):
        return "not run", reason
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "failed", "out of memory"
    return "failed", f"{type(error).__name__}: {reason}"


def _profile(
    runs: dict[str, Run], result: CaseResult, on_progress: Callable[[str], object]
) -> None:
    for found in result.rows:
        # Of the limit there is nothing to say but its launches.
        if found.name not in runs or (found.name == LIMIT and not result.host_hidden):
            continue
        on_progress(f"profile of {found.name}")
        run = runs[found.name]
        try:
            profile = profile_step(run, run.work.params[0].device)
        except Exception:  # the times stand all the same
            continue
        found.kernels, found.extra_bytes = profile.kernels, profile.extra_bytes


def empty_caches() -> None:
    """Give back the memory of tensors that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
