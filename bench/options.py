"""Command-line options that several subcommands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import argument_types
from bench.argument_types import positive
from bench.cases.case import DTYPES, Case
from bench.measuring.measure import Method
from bench.reporting.progress import Plan
from bench.reporting.results import Report
from bench.rows import registry
from bench.rows.optimizers import OPTIMIZERS
from bench.rows.registry import Row


def add_method(parser: argparse.ArgumentParser) -> None:
    """How to measure."""
    add, defaults = parser.add_argument, Method()
    add(
        "--repetitions",
        type=integer(1),
        default=defaults.repetitions,
        help="timed steps per row, at least",
    )
    add("--seconds", type=positive, default=defaults.seconds, help="time more until they took this")
    add(
        "--processes", type=integer(1), default=defaults.processes, help="that share these in turns"
    )
    add("--warmup", type=integer(0), default=defaults.warmup, help="steps before them")
    add("--minutes", type=positive, default=math.inf, help="begin no case later than that")
    add("--cold", action="store_true", help="flush the caches before each step")
    add(
        "--compile-tensors",
        type=integer(0),
        default=defaults.compile_tensors,
        help="run the rows that are compiled tensor by tensor up to so many tensors",
    )
    add(
        "--first-steps",
        action=argparse.BooleanOptionalAction,
        default=defaults.first_steps,
        help="time first steps, in two fresh processes per row",
    )


def add_work(parser: argparse.ArgumentParser, several: bool = True) -> None:
    """Which rows, on which device, with which optimizers and dtypes."""
    add = parser.add_argument
    add("--rows", type=some_rows, default=(), metavar="PART,PART", help="those whose name has PART")
    nargs = "+" if several else None
    add("--device", nargs=nargs, default=["cpu"] if several else "cpu", help="cpu, cuda, cuda:1")
    names, dtypes = list(OPTIMIZERS), list(DTYPES)
    add("--optimizer", nargs=nargs, choices=names, default=["AdamW"] if several else "AdamW")
    add("--dtype", nargs=nargs, choices=dtypes, default=["float32"] if several else "float32")


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Where results go."""
    parser.add_argument(
        "--out", type=folder, help="folder of the results; default: build/bench/DEVICE"
    )
    parser.add_argument("--name", default=name, help="what files are called, without .json or .png")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)


def plan_of(
    command: str,
    cases: Sequence[Case],
    args: argparse.Namespace,
    draw: Callable[[Report, Path], Sequence[Path]],
) -> Plan:
    """What ``args`` ask for, by options of ``add_work``, ``add_method`` and ``add_output``."""
    return Plan(
        command,
        cases,
        args.rows,
        _method(args),
        args.out,
        args.name,
        args.minutes,
        draw if args.plots else lambda report, path: [],
    )


def _method(args: argparse.Namespace) -> Method:
    return Method(
        repetitions=args.repetitions,
        seconds=args.seconds,
        processes=args.processes,
        warmup=args.warmup,
        cold=args.cold,
        compile_tensors=args.compile_tensors,
        first_steps=args.first_steps,
    )


def some_rows(text: str) -> Sequence[Row]:
    """Rows by parts of their names, with a comma between."""
    try:
        return registry.choose([part.strip() for part in text.split(",")])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def integer(lowest: int) -> Callable[[str], int]:
    """An integer from ``lowest`` on; 1e6 is one too."""
    return argument_types.integer(
        lowest, lambda text: int(float(text)) if "e" in text.lower() else int(text)
    )


def folder(text: str) -> Path:
    """A folder that there is or that can be made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from error
    return path
