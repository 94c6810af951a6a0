"""``python -m bench train``: whole training steps, of which clip and step are a part."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench import options
from bench.cases.case import NotRunError, check_device
from bench.cases.gpt import GPT, HEAD_SIZE, GPTConfig, read_text
from bench.measuring import environment
from bench.measuring.timing import summarize
from bench.measuring.training import Result, train
from bench.reporting import plots, tables
from bench.reporting.progress import exit_code, output_folder
from bench.reporting.report import FIRST_STEPS
from bench.reporting.results import CaseResult, Report, RowResult
from bench.rows.updates import REFERENCE, UPDATES, Recipe

BASELINE = "torch, fused"
# Losses, of several nats, may differ by this much: roundings grow with each step of training.
CLOSE = 1e-2


@dataclass(frozen=True)
class Sizes:
    """What is trained by default on a kind of device."""

    config: GPTConfig
    batch: int
    steps: int


SIZES = {
    "cpu": Sizes(GPTConfig(), batch=8, steps=40),
    "cuda": Sizes(GPTConfig(layers=12, width=768, block=512), batch=16, steps=60),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "train",
        help="whole training steps",
        description="Train a small GPT once per way to clip and step, all in turns, and time the "
        "whole training step. Sizes that are not given fit the device.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, count = parser.add_argument, options.integer(1)
    add("--device", default="cpu", help="cpu, cuda, cuda:1")
    add("--rows", nargs="+", choices=list(UPDATES), default=list(UPDATES), help="ways to clip")
    steps = options.integer(FIRST_STEPS + 1)
    add("--steps", type=steps, help=f"training steps, of which {FIRST_STEPS} are not timed")
    add("--batch", type=count, help="windows of text per step")
    add("--block", type=count, help="bytes per window")
    add("--layers", type=count, help="transformer blocks")
    add("--width", type=count, help=f"a multiple of {HEAD_SIZE}")
    options.add_output(parser, "train")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and plot.

    Returns:
        An exit status: 1 if a row was wrong or nothing was measured.
    """
    try:
        check_device(args.device)
        config, recipe = _sizes(args)
        text = read_text()
    except (NotRunError, FileNotFoundError, ValueError) as error:
        print(f"not run: {error}")
        return 1
    names = list(dict.fromkeys([REFERENCE, *args.rows]))  # losses are compared with the first
    results, failed = train(config, recipe, text, torch.device(args.device), 0, names)
    where = environment.describe(args.device)
    method = {**asdict(config), **asdict(recipe), "untimed_steps": FIRST_STEPS}
    case = _case(config, recipe, args.device, results)
    case.rows += [RowResult(name, "failed", reason) for name, reason in failed.items()]
    report = Report("train", where, method, [case])
    path: Path = output_folder(args.out, where) / f"{args.name}.json"
    report.write(path)
    table = tables.case_table(report.cases[0], tables.TRAIN_COLUMNS)
    print(f"{environment.headline(where)}\n{table}\n\n{tables.TRAIN_NOTES}\n\nResults: {path}")
    if args.plots:
        for figure in plots.of_train(report, path):
            print(f"Figure: {figure}")
    return exit_code(report)


def _sizes(args: argparse.Namespace) -> tuple[GPTConfig, Recipe]:
    usual = SIZES.get(torch.device(args.device).type, SIZES["cpu"])
    config = GPTConfig(
        args.layers or usual.config.layers,
        args.width or usual.config.width,
        args.block or usual.config.block,
    )
    if config.width % HEAD_SIZE:
        raise ValueError(f"--width {config.width} is no multiple of {HEAD_SIZE}")
    return config, Recipe(args.steps or usual.steps, args.batch or usual.batch)


def _case(config: GPTConfig, recipe: Recipe, device: str, results: list[Result]) -> CaseResult:
    params = list(GPT(config).parameters())
    elements = sum(p.numel() for p in params)
    title = (
        f"GPT with {elements:,} parameters in {len(params)} tensors, AdamW, "
        f"{recipe.steps} steps of {recipe.batch} x {config.block} bytes, {device}"
    )
    work = {"shapes": "GPT", "tensors": len(params), "elements": elements, "device": device}
    case = CaseResult({**work, "optimizer": "AdamW", "dtypes": "float32"}, title)
    reference = next(result for result in results if result.name == REFERENCE)
    case.rows = [_row(result, reference) for result in results]
    baseline = case.row(BASELINE)
    for row in case.rows:
        if baseline is not None and baseline.median_ms and row.median_ms:
            row.ratio = baseline.median_ms / row.median_ms
    return case


def _row(result: Result, reference: Result) -> RowResult:
    pairs = zip(result.losses, reference.losses, strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    row = RowResult(result.name, difference=difference)
    if not difference <= CLOSE:
        row.fail("wrong", f"wrong by {difference:.1e} in the loss")
        return row
    step = summarize(result.step_times[FIRST_STEPS:])
    row.median_ms, row.lower_ms, row.upper_ms = (
        1e3 * seconds for seconds in (step.median, step.lower, step.upper)
    )
    if result.update_times:
        row.update_ms = 1e3 * summarize(result.update_times[FIRST_STEPS:]).median
    row.first_cold_s = sum(result.step_times[:FIRST_STEPS])
    return row
