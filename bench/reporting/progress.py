"""Measuring a list of cases with a progress bar, each printed and stored when it is done."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench.cases.case import Case, NotRunError
from bench.measuring import environment
from bench.measuring.again import Asked, Found, again
from bench.measuring.environment import ROOT
from bench.measuring.measure import Measurement, Method, explain
from bench.measuring.memory import keep_freed_memory
from bench.reporting import tables
from bench.reporting.results import CaseResult, Report
from bench.rows import registry
from bench.rows.registry import Row


@dataclass(frozen=True)
class Plan:
    """What a command is to measure.

    Attributes:
        command: its name.
        cases: what to measure.
        rows: the ways to do it; all of them if empty.
        method: how.
        out: the folder of the results; None is the device's own.
        name: of the files.
        minutes: no case begins later than that.
        draw: makes the figures.
    """

    command: str
    cases: Sequence[Case]
    rows: Sequence[Row]
    method: Method
    out: Path | None
    name: str
    minutes: float
    draw: Callable[[Report, Path], Sequence[Path]]


class _Work:
    """A plan and what it has found so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        where = environment.describe(plan.cases[0].device)
        self.report = Report(plan.command, where, asdict(plan.method))
        self.path = output_folder(plan.out, where) / f"{plan.name}.json"

    def add(self, result: CaseResult) -> None:
        """Print and store ``result``, in the order of the plan."""
        cases, titles = self.report.cases, [case.title for case in self.plan.cases]
        cases.append(result)
        cases.sort(key=lambda case: titles.index(case.title))
        tqdm.write(tables.case_table(result), file=sys.stdout)
        self.report.write(self.path)


def run_plans(plans: Sequence[Plan]) -> int:
    """Measure ``plans`` together, print and plot; a case that cannot be measured gets a line.

    Returns:
        An exit status: 1 if a row was wrong, a plan measured nothing or two write the same file.
    """
    works = [_Work(plan) for plan in plans if plan.cases]
    paths = [work.path for work in works]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        print(f"not run: two commands write {path}; give one of them another --name")
        return 1
    for headline in dict.fromkeys(environment.headline(w.report.environment) for w in works):
        print(headline)
    keep_freed_memory()
    jobs = [_Job(work, case) for work in works for case in work.plan.cases]
    # In a file each refresh stays, so let there be few.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    total = sum(job.left for job in jobs)
    with (
        tempfile.TemporaryDirectory(prefix="bench-caches-") as caches,
        tqdm(total=total, unit="case", mininterval=interval) as bar,
    ):
        for job in jobs:
            job.measure(Path(caches), bar)
        while any(job.left for job in jobs):
            _measure_again([job for job in jobs if job.left], bar)
    statuses = [_conclude(work) for work in works]
    return max(statuses, default=1) if len(works) == len(plans) else 1


class _Job:
    """A case of a plan, and its measurement once that has begun.

    Attributes:
        left: in how many processes it is to be measured yet.
    """

    def __init__(self, work: _Work, case: Case) -> None:
        self.work, self.case = work, case
        self._rows = registry.for_device(work.plan.rows or registry.ROWS, case.device)
        self.method, self.left = work.plan.method, work.plan.method.processes
        self._spare = self.left - 1  # processes in place of those whose cores lay apart
        self._measurement: Measurement | None = None
        self._reason = ""

    def seconds_left(self, bar: tqdm) -> float:
        """Until the case may begin."""
        return 60 * self.work.plan.minutes - float(bar.format_dict["elapsed"])

    def measure(self, caches: Path, bar: tqdm) -> None:
        """Check the rows and time them, in this process."""
        bar.set_description_str(self.case.name)
        try:
            if self.seconds_left(bar) <= 0:
                raise NotRunError(f"the time is up (--minutes {self.work.plan.minutes:g})")
            if not self._rows:
                raise NotRunError(f"none of these rows is for {self.case.device}")
            found = Measurement(
                self.case, self._rows, self.method, caches, lambda what: _show(bar, what)
            )
            found.time()
            self._measurement = found
        except Exception as error:
            self._reason = str(error) if isinstance(error, NotRunError) else _line(error)
        self._count(bar)
        if self._measurement is None or not self._measurement.rows:
            bar.update(self.left)  # nothing to measure again
            self.left = 0
        self._finish_if_done()

    def asked(self, bar: tqdm) -> Asked:
        """What a further process is asked for."""
        assert self._measurement is not None
        return Asked(self.case, self._measurement.rows, self.method, self.seconds_left(bar))

    def add(self, found: Found, bar: tqdm) -> None:
        """Take in what a further process found."""
        assert self._measurement is not None
        self._measurement.add(found.times, found.errors)
        if found.reason:
            tqdm.write(f"{self.case.title}: fewer times are taken: {found.reason}", file=sys.stderr)
        self._count(bar)
        self._finish_if_done()

    def _count(self, bar: tqdm) -> None:
        if self._measurement is not None and self._measurement.apart and self._spare:
            self._spare -= 1
            bar.total += 1
        else:
            self.left -= 1
        bar.update()

    def _finish_if_done(self) -> None:
        if self.left:
            return
        result = CaseResult(self.case.to_json(), self.case.title, reason=self._reason)
        self.work.add(self._measurement.finish() if self._measurement else result)
        self._measurement = None


def _line(error: Exception) -> str:
    return ": ".join(explain(error))


def _measure_again(jobs: Sequence[_Job], bar: tqdm) -> None:
    """Measure in one further process; what it fails to is left as it is."""
    waiting = list(jobs)
    try:
        for found in again([job.asked(bar) for job in jobs]):
            job = waiting.pop(0)
            bar.set_description_str(job.case.name)
            job.add(found, bar)
    except RuntimeError as error:
        for job in waiting:
            job.add(Found({}, {}, str(error)), bar)


def _show(bar: tqdm, what: str) -> None:
    bar.set_postfix_str(what, refresh=sys.stderr.isatty())


def output_folder(out: Path | None, where: dict[str, object]) -> Path:
    """``out``, or the folder of this device among what is built."""
    return out or ROOT / "build" / "bench" / environment.slug(where)


def _conclude(work: _Work) -> int:
    """Say what the columns mean and where the files are, and sum up; the exit status."""
    report = work.report
    print(f"\n{tables.NOTES}\n\nResults: {work.path}")
    for figure in work.plan.draw(report, work.path):
        print(f"Figure: {figure}")
    print(f"\n{environment.headline(report.environment)}\n{tables.summary(report.cases)}")
    return exit_code(report)


def exit_code(report: Report) -> int:
    """1 if a row was wrong or nothing was measured, else 0."""
    found = [row for case in report.cases for row in case.rows]
    wrong = any(row.status == "wrong" for row in found)
    return int(wrong or not any(row.median_ms is not None for row in found))
