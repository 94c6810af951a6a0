"""Train a small GPT once per way to clip and step; print a table and draw a figure.

All runs of a seed start from the same weights and see the same batches, so that they differ in
nothing but how they clip and step.
"""

from __future__ import annotations

import argparse
import logging
from math import isfinite
from pathlib import Path

import torch

from bench.argument_types import integer, positive
from bench.cases.gpt import HEAD_SIZE, GPTConfig, read_text
from bench.measuring.training import train
from bench.reporting import report
from bench.rows.updates import Recipe

MIN_STEPS = report.FIRST_STEPS + report.LAST_STEPS


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = _parser()
    args = parser.parse_args(argv)
    text = read_text()
    if args.block >= len(text):
        parser.error(f"argument --block: the text has {len(text)} bytes, fewer than {args.block}")
    config = GPTConfig(args.layers, args.width, args.block)
    recipe = Recipe(args.steps, args.batch, args.lr, args.max_norm)
    # At each compilation Dynamo says that it leaves the optimizer's profiler range out.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    seeds = [train(config, recipe, text, args.device, seed)[0] for seed in args.seeds]
    results = [result for seed in seeds for result in seed]
    description = report.describe(config, recipe, args.device)
    report.figure(results, recipe.max_norm, description, args.out)
    print(f"{description}\n\n{report.table(results, recipe.max_norm)}\n\nFigure: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description="Train a small GPT on the source code of Python's standard library, once per "
        "way to clip gradients and step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    sizes, recipe = GPTConfig(), Recipe()
    steps, count = integer(MIN_STEPS), integer(1)
    add("--steps", type=steps, default=recipe.steps, help=f"at least {MIN_STEPS}")
    add("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--seeds", type=_seeds, default="0", help="of weights and batches: 0 or 0,1,2")
    add("--out", type=_png, default="demo.png", help="where the figure goes, a PNG")
    add("--max-norm", type=_finite, default=recipe.max_norm, help="what norms are clipped to")
    add("--lr", type=_finite, default=recipe.lr, help="the highest learning rate")
    add("--batch", type=count, default=recipe.batch, help="windows of text per step")
    add("--block", type=count, default=sizes.block, help="bytes per window")
    add("--layers", type=count, default=sizes.layers, help="transformer blocks")
    add("--width", type=_width, default=sizes.width, help=f"a multiple of {HEAD_SIZE}")
    return parser


def _width(text: str) -> int:
    width = integer(HEAD_SIZE)(text)
    if width % HEAD_SIZE:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of {HEAD_SIZE}")
    return width


def _finite(text: str) -> float:
    value = positive(text)
    if not isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value


def _seeds(text: str) -> list[int]:
    seeds = [integer(0)(seed) for seed in text.split(",")]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} has a seed twice")
    if max(seeds) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} has a seed of more than 63 bits")
    return seeds


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    # What a device that is not there raises differs from backend to backend.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise argparse.ArgumentTypeError(f"cannot train on {text!r}: {reason}") from error
    return device


def _png(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no file in a folder that exists")
    return path


if __name__ == "__main__":
    main()
