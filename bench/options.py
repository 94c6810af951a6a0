"""Command-line options that several subcommands take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bench.cases.case import DTYPES, Case
from bench.cases.gpt import HEAD_SIZE, GPTConfig
from bench.measuring.measure import Method
from bench.plans import Plan
from bench.rows import registry
from bench.rows.optimizers import OPTIMIZERS
from bench.rows.training_rows import Recipe

Commands = Any  # what ``argparse`` makes of subcommands is of a private class


def add_parser(commands: Commands, name: str, text: str, **more: Any) -> argparse.ArgumentParser:
    """Add a subcommand, whose help ``text`` is."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        **{"description": text, **more},
    )
    return parser


def add_plan(
    parser: argparse.ArgumentParser, name: str, plan: Callable[[argparse.Namespace], Plan]
) -> None:
    """What is measured and how; ``plan`` makes a plan of it, by ``plan_of``."""
    add, usual, count, names = parser.add_argument, Method(), integer(1), list(OPTIMIZERS)
    add("--rows", type=registry.choose, default=(), metavar="PART,PART", help="whose name has PART")
    add("--device", nargs="+", default=["cpu"], help="cpu, cuda, cuda:1")
    add("--optimizer", nargs="+", choices=names, default=["AdamW"], help="torch's")
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32"], help="of all tensors")
    add("--repetitions", type=count, default=usual.repetitions, help="timed steps, at least")
    add("--seconds", type=positive, default=usual.seconds, help="time more until they took this")
    add("--processes", type=count, default=usual.processes, help="that share these in turns")
    add("--warmup", type=integer(0), default=usual.warmup, help="steps before them, in each")
    add("--minutes", type=positive, default=math.inf, help="begin no case later than that")
    add("--cold", action="store_true", help="flush the caches before each step")
    most = "run the rows that are compiled tensor by tensor up to so many tensors"
    add("--compile-tensors", type=integer(0), default=usual.compile_tensors, help=most)
    fresh = "time first steps, in two fresh processes per row"
    yes_or_no = argparse.BooleanOptionalAction
    add("--first-steps", action=yes_or_no, default=usual.first_steps, help=fresh)
    add_output(parser, name)
    parser.set_defaults(plan=plan)


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """Where results go."""
    add = parser.add_argument
    add("--out", type=folder, help="folder of the results; default: build/bench/DEVICE")
    add("--name", default=name, help="what the file is called, without .json")
    # There were plots, which this left out; scripts may still say so.
    add("--no-plots", action="store_true", help=argparse.SUPPRESS)


def add_training(parser: argparse.ArgumentParser, least_steps: int) -> None:
    """What is trained, and where; what is not given is no attribute."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    count = integer(1)
    for name, read, text in (
        ("--steps", integer(least_steps), f"training steps, at least {least_steps}"),
        ("--batch", count, "windows of text per step"),
        ("--block", count, "bytes per window"),
        ("--layers", count, "transformer blocks"),
        ("--width", _width, f"a multiple of {HEAD_SIZE}"),
        ("--lr", positive, "the highest learning rate"),
        ("--max-norm", positive, "what norms are clipped to"),
    ):
        parser.add_argument(name, type=read, default=argparse.SUPPRESS, help=text)


def training(
    args: argparse.Namespace, config: GPTConfig, recipe: Recipe
) -> tuple[GPTConfig, Recipe]:
    """What is trained by options of ``add_training``; what is not given is as in the others."""
    config = replace(config, **{k: v for k, v in vars(args).items() if hasattr(config, k)})
    return config, replace(recipe, **{k: v for k, v in vars(args).items() if hasattr(recipe, k)})


def plan_of(command: str, cases: Sequence[Case], args: argparse.Namespace) -> Plan:
    """What ``args`` ask for, by options of ``add_plan``."""
    method = Method(**{f.name: getattr(args, f.name) for f in fields(Method)})
    return Plan(command, cases, args.rows, method, args.minutes, args.out, args.name)


def integer(lowest: int) -> Callable[[str], int]:
    """An integer from ``lowest`` on; 1e6 is one too."""

    def parse(text: str) -> int:
        try:
            value = int(float(text)) if "e" in text.lower() else int(text)
        except (ValueError, OverflowError):
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer from {lowest} on")
        return value

    return parse


def positive(text: str) -> float:
    """A number above 0, infinity too."""
    value = float(text)  # argparse says what is no number
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def folder(text: str) -> Path:
    """A folder that there is or that can be made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text!r}: {error.strerror}") from error
    return path


def _width(text: str) -> int:
    width = integer(HEAD_SIZE)(text)
    if width % HEAD_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of {HEAD_SIZE}")
    return width
