"""``python -m bench step``: clip and step alone, over lists of parameter shapes."""

from __future__ import annotations

import argparse
import itertools
import sys

from bench import options
from bench.cases.case import Case
from bench.cases.shapes import SHAPES, ModelError, Shape, of_model
from bench.reporting import plots
from bench.reporting.progress import Plan


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "step",
        help="clip and step alone",
        description="Time clip and step over lists of parameter shapes, each way beside torch's "
        "clip_grad_norm_ and fused optimizer and beside the limit of the memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="*", choices=list(SHAPES), default=None, help="lists of shapes")
    add("--model", action="append", default=[], metavar="MODULE:FUNCTION", help="a model of yours")
    options.add_work(parser)
    options.add_method(parser)
    options.add_output(parser, "step")
    parser.set_defaults(plan=plan)


def plan(args: argparse.Namespace) -> Plan:
    """What the options ask for."""
    lists = _lists(args)
    work = itertools.product(args.device, args.dtype, args.optimizer, lists.items())
    cases = [
        Case(name, tuple(shapes), optimizer, dtypes, device)
        for device, dtypes, optimizer, (name, shapes) in work
    ]
    return options.plan_of("step", cases, args, plots.of_step)


def _lists(args: argparse.Namespace) -> dict[str, list[Shape]]:
    """The lists of shapes by name; a model that fails gets a line and is left out."""
    names = list(SHAPES) if args.shapes is None and not args.model else args.shapes or []
    lists = {name: SHAPES[name]() for name in names}
    for spec in args.model:
        try:
            lists[spec] = of_model(spec)
        except ModelError as error:
            print(f"not run: {error}", file=sys.stderr)
    return lists
