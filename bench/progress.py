"""Measuring a list of cases with a progress bar, each printed and stored when it is done."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench import environment, rows, tables
from bench.case import Case, NotRunError
from bench.environment import ROOT
from bench.measure import Measurement, Method, compiles_tensors, explain
from bench.results import CaseResult, Report
from bench.rows import Row

FEW = 32  # so many tensors are compiled again in seconds


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
    jobs = [_Job(work, case) for work in works for case in work.plan.cases]
    # In a file each refresh stays, so let there be few.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with (
        tempfile.TemporaryDirectory(prefix="bench-caches-") as caches,
        tqdm(total=len(jobs), unit="case", mininterval=interval) as bar,
    ):
        for job, result in _results(jobs, Path(caches), bar):
            job.work.add(result)
            bar.update()
    statuses = [_conclude(work) for work in works]
    return max(statuses, default=1) if len(works) == len(plans) else 1


class _Job:
    """A case of a plan, and its measurement once that has begun.

    Attributes:
        compiles: whether starting it makes all that others compiled be compiled again.
        waits: whether its tensors are kept while others are measured.
    """

    def __init__(self, work: _Work, case: Case) -> None:
        self.work, self.case = work, case
        self.error: Exception | None = None
        self._measurement: Measurement | None = None
        plan = work.plan
        self.compiles = compiles_tensors(plan.rows or rows.ROWS, case, plan.method)
        self.waits = case.is_small and not (self.compiles and len(case.shapes) > FEW)
        self._blocks = plan.method.blocks if self.waits else 1
        self._done = 0

    def start(self, caches: Path, bar: tqdm) -> None:
        """Check the rows."""
        plan = self.work.plan

        def check() -> None:
            bar.set_description_str(self.case.name)
            if bar.format_dict["elapsed"] >= 60 * plan.minutes:
                raise NotRunError(f"the time is up (--minutes {plan.minutes:g})")
            self._measurement = Measurement(
                self.case,
                plan.rows or rows.ROWS,
                plan.method,
                caches,
                lambda what: _show(bar, what),
            )

        self._try(check)

    def time_block(self, until: float) -> bool:
        """Time a block unless ``until``, a part of all of them, is done or one has failed."""
        measurement = self._measurement
        if self.error or measurement is None or self._done >= round(until * self._blocks):
            return False
        self._done += 1
        self._try(lambda: measurement.time(self._blocks))
        return True

    def finish(self) -> CaseResult:
        """What was found; the tensors are let go."""
        measurement, self._measurement = self._measurement, None
        if measurement is not None and self.error is None:
            try:
                return measurement.finish()
            except Exception as error:
                self.error = error
        reason = ": ".join(explain(self.error)) if self.error else ""
        if isinstance(self.error, NotRunError):
            reason = str(self.error)
        return CaseResult(self.case.to_json(), self.case.title, reason=reason)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self.error = error


def _results(jobs: Sequence[_Job], caches: Path, bar: tqdm) -> Iterator[tuple[_Job, CaseResult]]:
    """Measure the cases, those that wait in turns between others.

    What compiles comes first: it would make those that wait compile again before each block.
    """
    waiting = [job for job in jobs if job.waits]
    first = [job for job in jobs if not job.waits and job.compiles]
    others = [job for job in jobs if not job.waits and not job.compiles]

    def alone(job: _Job) -> tuple[_Job, CaseResult]:
        job.start(caches, bar)
        job.time_block(until=1.0)
        return job, job.finish()

    def in_turns(until: float) -> None:
        while sum(job.time_block(until) for job in waiting):  # a block of each at a time
            pass

    yield from map(alone, first)
    for job in waiting:
        job.start(caches, bar)
    for number, job in enumerate(others, start=1):
        in_turns(number / (len(others) + 1))
        yield alone(job)
    in_turns(until=1.0)
    for job in waiting:
        yield job, job.finish()


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
