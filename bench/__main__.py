"""``python -m bench``: what clipping costs, by every way to do it, on this machine."""

from __future__ import annotations

import argparse
import logging
import sys

from bench import scaling, step, train
from bench.reporting.progress import run_plans

# Between commands that are measured together.
AND = "+"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand, or several with a plus between.

    Returns:
        The exit status: 1 if a row was wrong or nothing was measured.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"Commands with a {AND} between, as in 'step {AND} scaling', are measured together: "
        "with --processes, all of them in one, then all in the next.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (step, train, scaling):
        module.add_parser(commands)
    chosen = [parser.parse_args(part) for part in _parts(sys.argv[1:] if argv is None else argv)]
    # At each compilation Dynamo says that it leaves the optimizer's profiler range out.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    statuses: list[int] = [args.run(args) for args in chosen if hasattr(args, "run")]
    plans = [args.plan(args) for args in chosen if hasattr(args, "plan")]
    if plans:
        statuses.append(run_plans(plans))
    return max(statuses)


def _parts(argv: list[str]) -> list[list[str]]:
    """What is between the pluses."""
    parts: list[list[str]] = [[]]
    for word in argv:
        if word == AND:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


if __name__ == "__main__":
    sys.exit(main())
