"""``python -m bench step`` and ``scaling``: clip and step alone, over lists of parameter shapes."""

from __future__ import annotations

import argparse
import itertools

from bench import options
from bench.cases.case import Case
from bench.cases.shapes import SHAPES, of_model
from bench.plans import Plan

TENSORS = (10, 30, 100, 300, 1000, 5000)
SIZES = (10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
# In the sweep over tensors each is of this shape; in the sweep over sizes there are so many.
SHAPE = (32, 32)
COUNT = 16


def add_parser(commands: options.Commands) -> None:
    """Add the subcommands."""
    what = "Time clip and step over lists of parameter shapes, each way beside torch's "
    what += "clip_grad_norm_ and fused optimizer and beside the limit of the memory."
    parser = options.add_parser(commands, "step", "clip and step alone", description=what)
    add, name = parser.add_argument, "MODULE:FUNCTION"
    add("--shapes", nargs="*", choices=list(SHAPES), default=None, help="lists of shapes")
    add("--model", action="append", type=of_model, default=[], metavar=name, help="yours")
    options.add_plan(parser, "step", _step)

    what = (
        f"Time clip and step over N tensors of {SHAPE[0]} x {SHAPE[1]}, and over {COUNT} tensors "
    )
    what += "of N elements together."
    about = "clip and step against number and size of tensors"
    parser = options.add_parser(commands, "scaling", about, description=what)
    add, sizes = parser.add_argument, options.integer(COUNT)
    add("--tensors", nargs="*", type=options.integer(1), default=list(TENSORS), help="numbers")
    add("--sizes", nargs="*", type=sizes, default=list(SIZES), help="elements of all together")
    options.add_plan(parser, "scaling", _scaling)


def _step(args: argparse.Namespace) -> Plan:
    names = list(SHAPES) if args.shapes is None and not args.model else args.shapes or []
    lists = {name: SHAPES[name]() for name in names} | dict(args.model)
    work = itertools.product(args.device, args.dtype, args.optimizer, lists.items())
    cases = [
        Case(name, tuple(shapes), optimizer, dtypes, device)
        for device, dtypes, optimizer, (name, shapes) in work
    ]
    return options.plan_of("step", cases, args)


def _scaling(args: argparse.Namespace) -> Plan:
    shapes = [(f"{n:,} tensors", (SHAPE,) * n) for n in sorted(set(args.tensors))]
    shapes += [(f"{n:,} elements", ((n // COUNT,),) * COUNT) for n in sorted(set(args.sizes))]
    work = itertools.product(args.device, args.dtype, args.optimizer, shapes)
    cases = [
        Case(name, tensors, optimizer, dtypes, device)
        for device, dtypes, optimizer, (name, tensors) in work
    ]
    return options.plan_of("scaling", cases, args)
