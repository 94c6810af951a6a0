"""``python -m bench``: what clipping costs, by every way to do it, on this machine."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby

from bench import publish, step, train
from bench.cases.case import NotRunError
from bench.plans import run_plans

# Between commands that are measured together.
AND = "+"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand, or several with a plus between.

    Returns:
        The exit status: 1 if a row was wrong, nothing was measured or a page is not up to date.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"Commands with a {AND} between, as in 'step {AND} scaling', are measured together: "
        "with --processes, all of them in one, then all in the next.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (step, train, publish):
        module.add_parser(commands)
    words = groupby(sys.argv[1:] if argv is None else argv, lambda word: word == AND)
    parts = [list(part) for is_and, part in words if not is_and]
    chosen = [parser.parse_args(part) for part in parts or [[]]]
    try:
        statuses: list[int] = [args.run(args) for args in chosen if "run" in args]
    except NotRunError as error:
        print(f"not run: {error}")
        return 1
    plans = [args.plan(args) for args in chosen if "plan" in args]
    return max([*statuses, *([run_plans(plans)] if plans else [])])


if __name__ == "__main__":
    sys.exit(main())
