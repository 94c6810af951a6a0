"""``python -m bench.publish``: the tables of docs/benchmarks.md, from the committed results.

In that page, what lies between ``<!-- bench:step -->`` (or ``train``, ``scaling``) and
``<!-- /bench -->`` is replaced by what ``bench/results/*/*.json`` hold of that command; with
``bench:step cuda`` (or ``cpu``) by what they hold of that kind of device.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import options
from bench.cases.shapes import label
from bench.measuring.environment import ROOT, device_type, headline
from bench.reporting.results import CaseResult, Report, RowResult, read
from bench.reporting.tables import (
    TRAIN_COLUMNS,
    microseconds,
    milliseconds,
    percent,
    ratio,
    rows_table,
    seconds,
    table,
)
from bench.rows import training_rows
from bench.rows.registry import BASELINE, NAMES, ONE_GRAPH, OURS

PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- bench:(\w+)(?: (\w+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOTHING = "–"  # noqa: RUF001  # a dash, not a minus
STOCK = ("clip + for-loop", "clip + foreach", BASELINE)
PIPE = "pipe"  # a table in Markdown


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_parser(commands, "publish", "results into docs/benchmarks.md")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the tables into the page.

    Returns:
        An exit status: 1 if a file is not as expected.
    """
    try:
        args.page.write_text(render(args.page.read_text(), args.results))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def render(text: str, results: Path) -> str:
    """``text`` with each block's tables as the files in ``results`` have them.

    Raises:
        ValueError: a block names no command, or a file is no result.
    """
    paths = sorted(results.glob("*/*.json"), key=lambda path: (path.parent, path.stem))
    reports = [read(path) for path in paths]

    def block(found: re.Match[str]) -> str:
        command, kind = found.group(2, 3)
        if command not in RENDER:
            raise ValueError(f"<!-- bench:{command} --> is none of {', '.join(RENDER)}")
        of_command = [report for report in reports if report.command == command]
        kinds = [(report, device_type(report.environment)) for report in of_command]
        parts = [RENDER[command](report) for report, own in kinds if kind in (None, own)]
        body = "\n\n".join(parts) or "No results yet."
        return f"{found.group(1)}\n{body}\n\n{found.group(4)}"

    return BLOCK.sub(block, text)


def step(report: Report) -> str:
    """Per dtype: rows against shapes for the first optimizer, then optimizers against shapes."""
    cases = [case for case in report.cases if case.rows]
    parts = [_about(report, f"median ms, and times as fast as {BASELINE} in parentheses")]
    for dtypes in dict.fromkeys(case.case["dtypes"] for case in cases):
        of_dtype = [case for case in cases if case.case["dtypes"] == dtypes]
        optimizers = list(dict.fromkeys(case.case["optimizer"] for case in of_dtype))
        if len(optimizers) == 1:
            parts.append(_rows_by_shapes(of_dtype, f"{optimizers[0]}, {dtypes}"))
        else:
            parts.append(_optimizers_by_shapes(of_dtype, dtypes, optimizers))
    return "\n\n".join(parts)


def train(report: Report) -> str:
    """Rows with the training step and its part for clip and step."""
    (case,) = report.cases
    page = f"{_about(report, case.title)}\n\n{rows_table(case, TRAIN_COLUMNS, PIPE)}"
    ours = case.row(training_rows.OURS)
    if ours is None or not ours.ratio:
        return page
    less = 100 * (1 - 1 / ours.ratio)
    much = f"{abs(less):.1f} % {'less' if less >= 0 else 'more'} time"
    rows = f"{training_rows.OURS} than with {training_rows.BASELINE}"
    return f"{page}\n\nIn all, training took {much} with {rows}."


def scaling(report: Report) -> str:
    """Sizes with both times, and with first steps."""
    hidden = any(case.host_hidden for case in report.cases)
    lines = []
    for case in report.cases:
        ours, stock, graph = (_find(case, name) for name in (OURS, BASELINE, ONE_GRAPH))
        if ours is None or stock is None:
            continue
        cells = [f"{case.case['tensors']:,}", f"{case.case['elements']:,}"]
        for row in (stock, ours):
            cells += [milliseconds(row.median_ms), *([microseconds(row.host_us)] if hidden else [])]
        cells += [ratio(ours.ratio), *([ratio(ours.host_ratio)] if hidden else [])]
        firsts = [seconds(row.first_cold_s if row else None) for row in (graph, ours)]
        lines.append([*cells, percent(ours.share_of_limit), *firsts])
    headers = ["tensors", "parameters"]
    if hidden:
        headers += [f"{name}, {of}" for name in (BASELINE, OURS) for of in ("GPU ms", "host µs")]
        headers += ["GPU, times as fast", "host, times as fast"]
    else:
        headers += [f"{BASELINE}, ms", f"{OURS}, ms", "times as fast"]
    headers += ["share of the limit", f"first step of {ONE_GRAPH}, s", f"of {OURS}, s"]
    work = report.cases[0].case
    about = _about(report, f"{work['optimizer']}, {work['dtypes']}")
    return f"{about}\n\n{table(lines, headers, PIPE)}"


RENDER: dict[str, Callable[[Report], str]] = {"step": step, "train": train, "scaling": scaling}


def _about(report: Report, what: str) -> str:
    measured = [case for case in report.cases if case.rounds]
    rounds = min((case.rounds for case in measured), default=report.method.get("repetitions"))
    processes = min((case.processes for case in measured), default=1)
    times = f"; medians of at least {rounds}, in turns" if rounds else ""
    times += f", in at least {processes} processes" if processes > 1 else ""
    return f"{headline(report.environment)}{times}; {what}:"


def _rows_by_shapes(cases: Sequence[CaseResult], what: str) -> str:
    lines = []
    for name in NAMES:
        cells = [cell for case in cases for cell in _cells(case, _find(case, name))]
        if any(cell != NOTHING for cell in cells):
            lines.append([name, *cells])
    headers = []
    for case in cases:
        shown = label(case.case["shapes"])
        headers += [f"{shown}, GPU ms", "host µs"] if case.host_hidden else [shown]
    return table(lines, [what, *headers], PIPE)


def _optimizers_by_shapes(
    cases: Sequence[CaseResult], dtypes: str, optimizers: Sequence[str]
) -> str:
    shapes = list(dict.fromkeys(case.case["shapes"] for case in cases))
    by_key = {(case.case["optimizer"], case.case["shapes"]): case for case in cases}
    lines = [
        [optimizer, *[_versus(by_key.get((optimizer, name))) for name in shapes]]
        for optimizer in optimizers
    ]
    what = f"torch's fastest two calls / {OURS}, {dtypes}"
    return table(lines, [what, *[label(name) for name in shapes]], PIPE)


def _cells(case: CaseResult, row: RowResult | None) -> list[str]:
    """The time, and the host's if that was taken by itself."""
    if row is None or row.status in ("not run", "failed"):
        found = [NOTHING, NOTHING]
    elif row.median_ms is None:
        found = [row.status, NOTHING]
    else:
        found = [
            f"{time} ({ratio(times)})" if times else time
            for time, times in (
                (milliseconds(row.median_ms), row.ratio),
                (microseconds(row.host_us), row.host_ratio),
            )
        ]
    return found if case.host_hidden else found[:1]


def _versus(case: CaseResult | None) -> str:
    ours = case and case.row(OURS)
    stock = [row.median_ms for name in STOCK if case and (row := case.row(name)) and row.median_ms]
    if not ours or not ours.median_ms or not stock:
        return NOTHING
    times = f"{milliseconds(min(stock))} / {milliseconds(ours.median_ms)}"
    return f"{times} = {min(stock) / ours.median_ms:.2f}"


def _find(case: CaseResult, name: str) -> RowResult | None:
    return next((row for row in case.rows if row.name == name), None)


if __name__ == "__main__":
    from bench.__main__ import main

    sys.exit(main(["publish", *sys.argv[1:]]))
