"""``python -m bench scaling``: how the cost grows with number and size of tensors."""

from __future__ import annotations

import argparse

from bench import options
from bench.cases.case import Case
from bench.reporting import plots
from bench.reporting.progress import Plan

TENSORS = (10, 30, 100, 300, 1000, 5000)
SIZES = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
# In the sweep over tensors each is of this shape; in the sweep over sizes there are so many.
SHAPE = (32, 32)
COUNT = 16


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "scaling",
        help="clip and step against number and size of tensors",
        description=f"Time clip and step over N tensors of {SHAPE[0]} x {SHAPE[1]}, and over "
        f"{COUNT} tensors of N elements together.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tensors", nargs="*", type=options.integer(1), default=list(TENSORS), help="numbers")
    sizes = options.integer(COUNT)
    add("--sizes", nargs="*", type=sizes, default=list(SIZES), help="elements of all together")
    options.add_work(parser, several=False)
    options.add_method(parser)
    options.add_output(parser, "scaling")
    parser.set_defaults(plan=plan)


def plan(args: argparse.Namespace) -> Plan:
    """What the options ask for."""
    shapes = [(f"{n:,} tensors", (SHAPE,) * n) for n in sorted(set(args.tensors))]
    shapes += [(f"{n:,} elements", ((n // COUNT,),) * COUNT) for n in sorted(set(args.sizes))]
    cases = [
        Case(name, tensors, args.optimizer, args.dtype, args.device) for name, tensors in shapes
    ]
    return options.plan_of("scaling", cases, args, plots.of_scaling)
