"""Measuring a list of cases with a progress bar, each printed and stored when it is done."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from bench import environment, rows, tables
from bench.case import Case, NotRunError
from bench.environment import ROOT
from bench.measure import Method, explain, measure
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
        for case in cases:
            bar.set_description_str(case.name)
            if bar.format_dict["elapsed"] < 60 * args.minutes:
                result = measure_case(case, chosen or rows.ROWS, method, Path(caches), bar)
            else:
                reason = f"the time is up (--minutes {args.minutes:g})"
                result = CaseResult(case.to_json(), case.title, reason=reason)
            report.cases.append(result)
            tqdm.write(tables.case_table(result), file=sys.stdout)
            report.write(path)
            bar.update()
    return report, path


def measure_case(
    case: Case, chosen: Sequence[Row], method: Method, caches: Path, bar: tqdm
) -> CaseResult:
    """Measure ``case``; if that cannot be, say why in its result."""
    try:
        return measure(case, chosen, method, caches, lambda what: _show(bar, what))
    except NotRunError as error:
        reason = str(error)
    except Exception as error:
        reason = ": ".join(explain(error))
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
