"""Measuring a list of cases with a progress bar, each printed and stored when it is done."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench import environment, rows, tables
from bench.case import Case, NotRunError
from bench.environment import ROOT
from bench.measure import Measurement, Method, explain
from bench.results import CaseResult, Report
from bench.rows import Row


def run_cases(
    command: str,
    cases: Sequence[Case],
    chosen: Sequence[Row],
    method: Method,
    args: argparse.Namespace,
) -> tuple[Report, Path]:
    """Measure ``cases``; a case that cannot be measured gets a line.

    Args:
        command: the subcommand's name, for the report.
        cases: what to measure; not empty.
        chosen: the rows; all of them if empty.
        method: how.
        args: with ``out``, ``name`` and ``minutes``.

    Returns:
        The report, and the JSON file that holds it.
    """
    where = environment.describe(cases[0].device)
    report = Report(command, where, asdict(method))
    path = output_folder(args.out, where) / f"{args.name}.json"
    print(environment.headline(where))
    # In a file each refresh stays, so let there be few.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with (
        tempfile.TemporaryDirectory(prefix="bench-caches-") as caches,
        tqdm(total=len(cases), unit="case", mininterval=interval) as bar,
    ):
        measured = _results(cases, chosen or rows.ROWS, method, Path(caches), args.minutes, bar)
        for result in measured:
            report.cases.append(result)
            tqdm.write(tables.case_table(result), file=sys.stdout)
            report.write(path)
            bar.update()
    return report, path


def _results(
    cases: Sequence[Case],
    chosen: Sequence[Row],
    method: Method,
    caches: Path,
    minutes: float,
    bar: tqdm,
) -> Iterator[CaseResult]:
    """Measure ``cases``: the others each at a time, the blocks of the small ones between them."""
    small = [case for case in cases if case.is_small]
    large = [case for case in cases if not case.is_small]
    waiting = _Waiting(method.blocks, bar)

    def start(case: Case) -> Measurement:
        bar.set_description_str(case.name)
        if bar.format_dict["elapsed"] >= 60 * minutes:
            raise NotRunError(f"the time is up (--minutes {minutes:g})")
        return Measurement(case, chosen, method, caches, lambda what: _show(bar, what))

    for case in small:
        try:
            waiting.measurements[case] = start(case)
        except Exception as error:
            yield _failed(case, error)
    for number, case in enumerate(large):
        waiting.time(until=(number + 1) / (len(large) + 1))
        try:
            measurement = start(case)
            measurement.time()
            yield measurement.finish()
        except Exception as error:
            yield _failed(case, error)
    waiting.time(until=1.0)
    yield from waiting.results()


class _Waiting:
    """Small cases, whose tensors are kept while others are measured.

    Attributes:
        measurements: by case.
    """

    def __init__(self, blocks: int, bar: tqdm) -> None:
        self.measurements: dict[Case, Measurement] = {}
        self._errors: dict[Case, Exception] = {}
        self._blocks, self._done = blocks, 0
        self._bar = bar

    def time(self, until: float) -> None:
        """Time the next blocks, until this part of them is done."""
        while self._done < round(until * self._blocks):
            self._done += 1
            for case, measurement in self.measurements.items():
                self._bar.set_description_str(case.name)
                try:
                    if case not in self._errors:
                        measurement.time(self._blocks)
                except Exception as error:
                    self._errors[case] = error

    def results(self) -> Iterator[CaseResult]:
        """What was found."""
        for case, measurement in self.measurements.items():
            try:
                if case in self._errors:
                    raise self._errors[case]
                yield measurement.finish()
            except Exception as error:
                yield _failed(case, error)


def _failed(case: Case, error: Exception) -> CaseResult:
    reason = str(error) if isinstance(error, NotRunError) else ": ".join(explain(error))
    return CaseResult(case.to_json(), case.title, reason=reason)


def _show(bar: tqdm, what: str) -> None:
    bar.set_postfix_str(what, refresh=sys.stderr.isatty())


def output_folder(out: Path | None, where: dict[str, object]) -> Path:
    """``out``, or the folder of this device among what is built."""
    return out or ROOT / "build" / "bench" / environment.slug(where)


def conclude(report: Report, path: Path, figures: Sequence[Path]) -> int:
    """Say what the columns mean and where the files are, and sum up.

    Returns:
        The exit status.
    """
    print(f"\n{tables.NOTES}\n\nResults: {path}")
    for figure in figures:
        print(f"Figure: {figure}")
    print(f"\n{environment.headline(report.environment)}\n{tables.summary(report.cases)}")
    return exit_code(report)


def exit_code(report: Report) -> int:
    """1 if a row was wrong or nothing was measured, else 0."""
    found = [row for case in report.cases for row in case.rows]
    wrong = any(row.status == "wrong" for row in found)
    return int(wrong or not any(row.median_ms is not None for row in found))
