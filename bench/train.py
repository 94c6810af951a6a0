"""``python -m bench train`` and ``demo``: whole training steps, of which clip and step are a part.

All runs start from the same weights and see the same batches, so that they differ in nothing but
how they clip and step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench import options
from bench.cases.case import check_device
from bench.cases.gpt import GPTConfig, read_text
from bench.measuring import environment
from bench.measuring.processes import prepare_process
from bench.measuring.training import FIRST_STEPS, LAST_STEPS, Result, case_of, train
from bench.reporting import tables
from bench.reporting.figure import figure
from bench.reporting.results import Report
from bench.rows.training_rows import REFERENCE, TRAINING_ROWS, Recipe

# What is trained by default on a kind of device, and in the demo.
USUAL = {
    "cpu": (GPTConfig(), Recipe(steps=40)),
    "cuda": (GPTConfig(layers=12, width=768, block=512), Recipe(steps=60, batch=16)),
    "demo": (GPTConfig(), Recipe()),
}


def add_parser(commands: options.Commands) -> None:
    """Add the subcommands."""
    what = "Train a small GPT once per way to clip and step, all in turns"
    parser = options.add_parser(commands, "train", "whole training steps", description=what)
    rows = list(TRAINING_ROWS)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, help="ways to clip")
    options.add_training(parser, FIRST_STEPS + 1)
    options.add_output(parser, "train")
    parser.set_defaults(run=_train)

    parser = options.add_parser(commands, "demo", "a table and a picture", description=what)
    options.add_training(parser, FIRST_STEPS + LAST_STEPS)
    parser.add_argument("--seeds", type=_seeds, default="0", help="of weights and batches: 0,1,2")
    parser.add_argument("--out", type=_png, default="demo.png", help="where the picture goes")
    parser.set_defaults(run=_demo)


def _train(args: argparse.Namespace) -> int:
    """Time whole training steps; an exit status, 1 if a row was wrong or nothing was measured."""
    report, _ = _trained(args, 0, list(dict.fromkeys([REFERENCE, *args.rows])))
    path: Path = environment.output_folder(args.out, report.environment) / f"{args.name}.json"
    report.write(path)
    print(f"\n{tables.TRAIN_NOTES}\n\nResults: {path}")
    return report.exit_code()


def _demo(args: argparse.Namespace) -> int:
    """Print a table per seed and draw; an exit status."""
    shown: list[Result] = []
    for seed in args.seeds:
        report, results = _trained(args, seed, list(TRAINING_ROWS), "demo")
        shown += results
    figure(report.cases[0], shown, report.method["max_norm"], args.out)
    print(f"\n{tables.TRAIN_NOTES}\n\nFigure: {args.out}")
    return 0


def _trained(
    args: argparse.Namespace, seed: int, names: Sequence[str], usual: str = ""
) -> tuple[Report, list[Result]]:
    """Train and print."""
    check_device(args.device)
    prepare_process()
    device = torch.device(args.device)
    config, recipe = options.training(args, *USUAL.get(usual or device.type, USUAL["cpu"]))
    results, failed = train(config, recipe, read_text(), device, seed, names)
    case = case_of(config, recipe, args.device, results, failed)
    where = environment.describe(args.device)
    print(f"{environment.headline(where)}, seed {seed}")
    print(tables.case_table(case, tables.DEMO_COLUMNS))
    method = {**asdict(config), **asdict(recipe), "untimed_steps": FIRST_STEPS}
    return Report("train", where, method, [case]), results


def _seeds(text: str) -> list[int]:
    return [options.integer(0)(seed) for seed in text.split(",")]


def _png(text: str) -> Path:
    return options.folder(str(Path(text).parent)) / Path(text).name
