"""``python -m bench``: what clipping costs, by every way to do it, on this machine."""

from __future__ import annotations

import argparse
import logging
import sys

from bench import scaling, step, train


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 1 if a row was wrong or nothing was measured.
    """
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (step, train, scaling):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    # At each compilation Dynamo says that it leaves the optimizer's profiler range out.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
