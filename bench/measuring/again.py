"""Rows timed once more, in a fresh process.

Processes differ by a tenth of a short step's time and more, each as long as it lasts. ``python -m
bench.measuring.again`` is such a process: it reads cases and names of rows from its input, and
prints a line of JSON for each case.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases.case import Case
from bench.cases.workload import Workload
from bench.measuring.environment import ROOT
from bench.measuring.first_step import use_caches
from bench.measuring.measure import Method, empty_caches, explain, forget_compiled, take_times
from bench.measuring.memory import keep_freed_memory
from bench.measuring.timing import Times
from bench.rows.registry import ROWS
from bench.rows.runs import Run


@dataclass(frozen=True)
class Asked:
    """A case and rows of it that were checked before.

    Attributes:
        rows: their names, each with the folder of its filled caches; None: the user's own.
        seconds_left: until the case may begin, from the start of the process.
    """

    case: Case
    rows: Mapping[str, Path | None]
    method: Method
    seconds_left: float


@dataclass(frozen=True)
class Found:
    """The times of a case's rows; the status and reason of those that failed, or of all of them."""

    times: dict[str, Times]
    errors: dict[str, tuple[str, str]]
    reason: str = ""


def again(asked: Sequence[Asked]) -> Iterator[Found]:
    """Time all that is asked for in one fresh process; yield what it finds, one after the other.

    Raises:
        RuntimeError: the process ended before it had found all.
    """
    command = [sys.executable, "-m", "bench.measuring.again"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        threads = torch.get_num_threads()
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            all_asked = {"threads": threads, "asked": [asdict(each) for each in asked]}
            json.dump(all_asked, stdin, default=str)
        found = 0
        for line in process.stdout:
            if not line.endswith("\n"):  # it ended while it wrote
                break
            found += 1
            yield _found(**json.loads(line))
    if process.returncode or found < len(asked):
        raise RuntimeError(f"a process ended early, with exit status {process.returncode}")


def _found(times: dict[str, Any], errors: dict[str, Any], reason: str) -> Found:
    failed = {name: (status, why) for name, (status, why) in errors.items()}
    return Found({name: Times(**each) for name, each in times.items()}, failed, reason)


def _time(case: Case, folders: Mapping[str, Path | None], method: Method) -> Found:
    try:
        work = Workload(case)
    except Exception as error:
        return Found({}, {}, ": ".join(explain(error)))
    runs: dict[str, Run] = {}
    failed: dict[str, tuple[str, str]] = {}
    chosen = [row for row in ROWS if row.name in folders]
    forget_compiled(chosen)
    for row in chosen:
        try:
            with use_caches(folders[row.name]):
                run = row.start(work)
                run.prepare(work.new_grads())
                run.step()
                run.release()
            runs[row.name] = run
        except Exception as error:
            failed[row.name] = explain(error)
    times, errors = take_times(runs, method) if runs else ({}, {})
    return Found(times, failed | errors)


def main() -> None:
    """Time what the input asks for."""
    begin = time.perf_counter()
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    for each in asked["asked"]:
        shapes = tuple(tuple(shape) for shape in each["case"].pop("shapes"))
        case, method = Case(**each["case"], shapes=shapes), Method(**each["method"])
        found = Found({}, {}, "the time is up")
        if time.perf_counter() - begin < each["seconds_left"]:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for what is found
                folders = {n: f and Path(f) for n, f in each["rows"].items()}
                found = _time(case, folders, method)
        print(json.dumps(asdict(found)), flush=True)
        empty_caches()


if __name__ == "__main__":
    main()
