"""Measuring the cases of several commands together; what is found is stored as soon as it is."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench.cases.case import Case, NotRunError
from bench.cases.workload import check_fits
from bench.measuring import environment
from bench.measuring.conclude import conclude
from bench.measuring.measure import (
    FirstStep,
    Method,
    Part,
    empty_memory,
    explain,
    first_steps,
    measure,
)
from bench.measuring.processes import fresh_process, prepare_process
from bench.reporting import tables
from bench.reporting.results import CaseResult, Report
from bench.rows import registry
from bench.rows.registry import Row


@dataclass
class Plan:
    """What a command is to measure, and what was found so far.

    Attributes:
        rows: the ways to do it; all of them if empty.
        minutes: no case begins later than that.
        out: the folder of the results; None is the device's own.
        name: of the file.
    """

    command: str
    cases: Sequence[Case]
    rows: Sequence[Row]
    method: Method
    minutes: float
    out: Path | None
    name: str

    def __post_init__(self) -> None:
        where = environment.describe(self.cases[0].device)
        results = [
            CaseResult(case.to_json(), case.title, host_hidden=case.device.startswith("cuda"))
            for case in self.cases
        ]
        self.report = Report(self.command, where, asdict(self.method), results)
        self.path = environment.output_folder(self.out, where) / f"{self.name}.json"


class _Job:
    """A case of a plan, and what the processes found of it."""

    def __init__(self, plan: Plan, case: Case, result: CaseResult) -> None:
        self.plan, self.case, self.result = plan, case, result
        self._rows = registry.for_device(plan.rows or registry.ROWS, case.device)
        self._firsts: dict[str, FirstStep] = {}
        self._parts: list[Part] = []
        self._done = False

    def measure(
        self, turn: int, begun: float, caches: Path, process: ProcessPoolExecutor | None
    ) -> None:
        """Take the part of process number ``turn``; what fails is said, and leaves other parts."""
        if self._done:
            return
        try:
            self._parts.append(self._part(begun, caches, process))
            conclude(self.result, self._parts, self._firsts)
        except Exception as error:
            self.result.reason = reason = explain(error)[1]
            if turn:
                self.result.reason = ""
                reason = f"fewer times are taken: {reason}"
                tqdm.write(f"{self.case.title}: {reason}", file=sys.stderr)
        empty_memory()
        self.plan.report.write(self.plan.path)
        self._done = turn + 1 == self.plan.method.processes or not any(p.times for p in self._parts)
        if self._done:
            tqdm.write(tables.case_table(self.result), file=sys.stdout)

    def _part(self, begun: float, caches: Path, process: ProcessPoolExecutor | None) -> Part:
        method = self.plan.method
        if time.perf_counter() - begun > 60 * self.plan.minutes:
            raise NotRunError(f"the time is up (--minutes {self.plan.minutes:g})")
        if process:
            args = self.case, self._rows, method, self._firsts
            return process.submit(measure, *args, trace=False).result()
        if not self._rows:
            raise NotRunError(f"none of these rows is for {self.case.device}")
        check_fits(self.case)
        # Before this process takes memory, of which the others need as much.
        self._firsts = first_steps(self.case, self._rows, method, caches)
        return measure(self.case, self._rows, method, self._firsts)


def run_plans(plans: Sequence[Plan]) -> int:
    """Measure ``plans`` together and print; a case that cannot be measured gets a line.

    Returns:
        An exit status: 1 if a row was wrong, a plan measured nothing or two write the same file.
    """
    paths = [plan.path for plan in plans]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        print(f"not run: two commands write {path}; give one of them another --name")
        return 1
    for headline in dict.fromkeys(environment.headline(p.report.environment) for p in plans):
        print(headline)
    prepare_process()
    _measure([_Job(p, *pair) for p in plans for pair in zip(p.cases, p.report.cases, strict=True)])
    print(f"\n{tables.NOTES}\n")
    for path in paths:
        print(f"Results: {path}")
    return max(plan.report.exit_code() for plan in plans)


def _measure(jobs: Sequence[_Job]) -> None:
    """All jobs in this process, then in a fresh one, as often as each is to be measured."""
    processes = [job.plan.method.processes for job in jobs]
    begun = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="bench-caches-") as caches,
        tqdm(total=sum(processes), unit="case", disable=None) as bar,
    ):
        for turn in range(max(processes, default=0)):
            with fresh_process() if turn else nullcontext() as process:
                for job in (job for job in jobs if turn < job.plan.method.processes):
                    bar.set_description(job.case.name)
                    job.measure(turn, begun, Path(caches), process)
                    bar.update()
