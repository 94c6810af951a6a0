"""Measure the rows of a case: each is checked first, then they are timed in turns."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases.case import Case, NotRunError
from bench.cases.workload import Workload, WrongError
from bench.measuring.gpu_timing import clock_for
from bench.measuring.processes import fresh_process, use_caches
from bench.measuring.profile import profile_step
from bench.measuring.timing import Times, interleave, synchronize
from bench.reporting.results import RowResult
from bench.rows.registry import Row
from bench.rows.runs import Run

FIRST_STEP_LIMIT = 600.0  # seconds


@dataclass(frozen=True)
class Method:
    """How to measure: options of the command line (``options.add_plan``)."""

    repetitions: int = 30
    seconds: float = 3.0
    processes: int = 1
    warmup: int = 5
    cold: bool = False
    compile_tensors: int = 200
    first_steps: bool = True


@dataclass
class Part:
    """What one process found.

    Attributes:
        rows: what is known of each row but its times.
        times: of those that were timed, all in the same rounds.
        bytes_per_parameter: what a step must move.
    """

    rows: list[RowResult]
    times: dict[str, Times] = field(default_factory=dict)
    bytes_per_parameter: float = 0.0


class FirstStep(NamedTuple):
    """Of a row: seconds with empty and with filled caches on disk, and the folder of the caches."""

    cold: float | None = None
    warm: float | None = None
    caches: Path | None = None


def first_steps(
    case: Case, chosen: Sequence[Row], method: Method, parent: Path
) -> dict[str, FirstStep]:
    """Time the first steps of the rows that compile, each in two fresh processes.

    Their caches are put in ``parent``. Of other rows ``measure`` tells.
    """
    found = {}
    for row in chosen:
        few = not row.per_tensor or len(case.shapes) <= method.compile_tensors
        if method.first_steps and row.compiles and few:
            caches = Path(tempfile.mkdtemp(dir=parent))
            with use_caches(caches):
                cold, warm = (_in_process(case, row) for _ in range(2))
            found[row.name] = FirstStep(cold, warm, caches)
    return found


def _in_process(case: Case, row: Row) -> float | None:
    with fresh_process(FIRST_STEP_LIMIT) as process:
        try:
            return process.submit(_first_step, case, row).result()
        except Exception:  # the check tells why
            return None


def _first_step(case: Case, row: Row) -> float:
    """From making the optimizer on; importing torch and making parameters come before."""
    return _start(row, Workload(case))[1]


def measure(
    case: Case,
    chosen: Sequence[Row],
    method: Method,
    firsts: Mapping[str, FirstStep],
    trace: bool = True,
) -> Part:
    """Check and time ``chosen`` rows of ``case`` in this process, which gets a part of the rounds.

    Args:
        case: the work.
        chosen: the rows; one that fails leaves the others alone.
        method: how.
        firsts: what ``first_steps`` found, whose caches are used.
        trace: whether to see what a step launches and allocates too.

    Raises:
        NotRunError: the case cannot be measured at all.
    """
    empty_memory()
    work = Workload(case)
    part = Part([RowResult(row.name) for row in chosen])
    part.bytes_per_parameter = work.needed_bytes / case.elements
    if any(row.per_tensor for row in chosen):
        torch.compiler.reset()  # another case is no recompilation, of which there may be a few only
    runs: dict[str, Run] = {}
    for row, found in zip(chosen, part.rows, strict=True):
        with use_caches(firsts.get(row.name, FirstStep()).caches):
            run = _checked(row, work, method, found)
        if run is not None:
            runs[row.name] = run
    if runs:
        part.times, errors = interleave(
            runs,
            clock_for(work.params[0].device, method.cold),
            -(-method.repetitions // method.processes),
            method.warmup,
            method.seconds / method.processes,
        )
        for found in part.rows:
            if found.name in errors:
                found.fail(*explain(errors[found.name]))
            elif found.name in runs and trace:
                with contextlib.suppress(Exception):  # the times stand all the same
                    found.kernels, found.extra_bytes = profile_step(runs[found.name])
    return part


def empty_memory() -> None:
    """Give back the memory of tensors that are gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _checked(row: Row, work: Workload, method: Method, found: RowResult) -> Run | None:
    """The run of ``row``, after the steps of the check; None if it fails, which ``found`` tells."""
    try:
        row.check_compilation(len(work.params), method.compile_tensors)
        work.reset()
        run, seconds = _start(row, work)
        for factor in work.factors[1:]:
            _step(run, work.new_grads(factor))
        found.difference = run.difference()
    except Exception as error:
        found.fail(*explain(error))
        return None
    if method.first_steps and not row.compiles and found.difference is not None:
        found.first_cold_s = found.first_warm_s = seconds
    return run


def _start(row: Row, work: Workload) -> tuple[Run, float]:
    """The run of ``row`` after its first step, and how long it took to get there."""
    grads, device = work.new_grads(work.factors[0]), work.params[0].device
    synchronize(device)
    start = time.perf_counter()
    run = row.start(work)
    _step(run, grads)
    return run, time.perf_counter() - start


def _step(run: Run, grads: Sequence[Tensor]) -> None:
    """Take a step with ``grads``, until its end."""
    run.prepare(grads)
    run.step()
    synchronize(run.work.params[0].device)
    run.release()


def explain(error: Exception) -> tuple[str, str]:
    """The status and the reason of a row, or a case, that ``error`` ended."""
    reason = " ".join(str(error).strip().partition("\n")[0].split())[:200]
    if isinstance(error, NotRunError):
        return "not run", reason
    if isinstance(error, WrongError):
        return "wrong", f"wrong {reason}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "failed", "out of memory"
    return "failed", f"{type(error).__name__}: {reason}"
