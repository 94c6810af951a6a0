"""``python -m bench.digest FOLDER``: what ``bench step`` found on a GPU, in one short table.

A line per case. Results of other commands and devices are passed over, and what is no result is
named, so that it stands whatever failed or ran out of time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from bench.cases.shapes import label
from bench.measuring.environment import device_type, headline
from bench.reporting.results import CaseResult, Report, read
from bench.reporting.tables import NONE, microseconds, milliseconds
from bench.rows.registry import BASELINE, LIMIT, OUR_GRAPH, OURS, STOCK_GRAPH

ROWS = (BASELINE, STOCK_GRAPH, OURS, OUR_GRAPH, LIMIT)


def main(argv: list[str] | None = None) -> int:
    """Print the table.

    Returns:
        The exit status: 1 if there is nothing to show.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.digest", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to look for results, folders in it too")
    args = parser.parse_args(argv)
    found = [report for report in _reports(args.folder) if report.command == "step"]
    reports = [report for report in found if device_type(report.environment) == "cuda"]
    print("\n".join(dict.fromkeys(headline(report.environment) for report in reports)))
    lines = [_line(case) for report in reports for case in report.cases]
    headers = ["GPU ms / host us / kernels", *[name.replace(", ", ",\n") for name in ROWS]]
    align = ["left", *["right"] * len(ROWS)]
    print(
        tabulate(lines, headers, disable_numparse=True, colalign=align) if lines else "no results"
    )
    return int(not lines)


def _reports(folder: Path) -> Iterator[Report]:
    for path in sorted(folder.rglob("*.json")):
        try:
            yield read(path)
        except (OSError, ValueError) as error:
            print(f"not read: {error}")


def _line(case: CaseResult) -> Sequence[str]:
    work = [label(case.case["shapes"]), case.case["optimizer"], case.case["dtypes"]]
    return [", ".join(work), *[_cell(case, name) for name in ROWS]]


def _cell(case: CaseResult, name: str) -> str:
    row = next((row for row in case.rows if row.name == name), None)
    if row is None or row.median_ms is None:
        return row.status if row else NONE
    kernels = NONE if row.kernels is None else str(row.kernels)
    return f"{milliseconds(row.median_ms)} / {microseconds(row.host_us)} / {kernels}"


if __name__ == "__main__":
    sys.exit(main())
