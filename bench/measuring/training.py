"""Train the same model on the same batches once per way to clip and step."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench.cases.gpt import GPT, GPTConfig, batches
from bench.measuring.timing import quartiles
from bench.reporting.results import CaseResult, RowResult
from bench.rows.training_rows import (
    BASELINE,
    REFERENCE,
    TRAINING_ROWS,
    Recipe,
    schedule,
)

# Losses, of several nats, may differ by this much: roundings grow with each step of training.
CLOSE = 1e-2
FIRST_STEPS = 5  # they compile and fill caches, so they do not count in a median
LAST_STEPS = 10  # the final loss is their mean


@dataclass
class Result:
    """What a run left behind; lists have an element per step, times are in seconds.

    ``step_times`` is the whole training step, ``update_times`` its clip and step alone, which a
    training step in one graph does not have: there it is empty.
    ``param_difference`` is the largest, at the end, from the reference run of the same seed.
    """

    name: str
    seed: int
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    update_times: list[float] = field(default_factory=list)
    param_difference: float = 0.0


class _Run:
    """A model in training."""

    def __init__(self, result: Result, weights: GPT, recipe: Recipe, device: torch.device) -> None:
        self.result = result
        self.model = copy.deepcopy(weights).to(device)
        self.update = TRAINING_ROWS[result.name](self.model, recipe)
        self.scheduler: LambdaLR = schedule(self.update.optimizer, recipe.steps)
        self._recorded: list[Tensor] = []

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """Train on one batch, which lies on the model's device."""
        start = _now(tokens.device)
        if self.update.train_step:
            loss, norm = self.update.train_step(tokens, targets)
        elif self.update.clip_and_step:
            loss = self.model(tokens, targets)
            loss.backward()
            before = _now(tokens.device)
            norm = self.update.clip_and_step()
            self.result.update_times.append(_now(tokens.device) - before)
            self.update.optimizer.zero_grad()
        self.scheduler.step()
        self.result.step_times.append(_now(tokens.device) - start)
        # Tensors, read when training is over: a value read now would make the host wait.
        self._recorded.append(torch.stack([loss.detach(), norm.to(loss.dtype)]))

    @torch.no_grad()
    def finish(self, reference: GPT) -> Result:
        """Read what was recorded, and compare the parameters with ``reference``'s."""
        self.result.losses, self.result.norms = torch.stack(self._recorded).T.tolist()
        pairs = zip(self.model.parameters(), reference.parameters(), strict=True)
        self.result.param_difference = max((p - q).abs().max().item() for p, q in pairs)
        return self.result


def train(
    config: GPTConfig,
    recipe: Recipe,
    text: Tensor,
    device: torch.device,
    seed: int,
    names: Sequence[str] = tuple(TRAINING_ROWS),
) -> tuple[list[Result], dict[str, str]]:
    """Train one run per name in ``names``, from the same weights on the same batches.

    The runs take turns step by step, so that whatever else the machine does meets all of them.

    Returns:
        The results in the order of ``names``, which hold ``REFERENCE``; and why others failed.
    """
    torch.compiler.reset()  # a further seed is no recompilation, of which there may be a few only
    torch.manual_seed(seed)
    weights = GPT(config)
    runs = [_Run(Result(name, seed), weights, recipe, device) for name in names]
    failed: dict[str, str] = {}
    drawn = batches(text, config.block, recipe.batch, seed)
    for _ in tqdm(range(recipe.steps), f"seed {seed}", unit="step", disable=None):
        tokens, targets = (t.to(device) for t in next(drawn))
        runs = [run for run in runs if _step(run, tokens, targets, failed)]
    reference = next(run.model for run in runs if run.result.name == REFERENCE)
    return [run.finish(reference) for run in runs], failed


def _step(run: _Run, tokens: Tensor, targets: Tensor, failed: dict[str, str]) -> bool:
    """Take a step of ``run``, and say whether it is to go on."""
    try:
        run.step(tokens, targets)
    # No C++ compiler, no header files of Python, no memory: the other rows go on.
    except Exception as error:
        name = run.result.name
        if name == REFERENCE:
            raise
        failed[name] = str(error).strip().partition("\n")[0] or type(error).__name__
        tqdm.write(f'The row "{name}" is left out: {failed[name]}', file=sys.stderr)
        return False
    return True


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def case_of(
    config: GPTConfig,
    recipe: Recipe,
    device: str,
    results: Sequence[Result],
    failed: Mapping[str, str],
) -> CaseResult:
    """What ``train`` found for a seed, as a case."""
    params = list(GPT(config).parameters())
    elements = sum(p.numel() for p in params)
    title = (
        f"GPT with {elements:,} parameters in {len(params)} tensors, AdamW, "
        f"{recipe.steps} steps of {recipe.batch} x {config.block} bytes, {device}"
    )
    work = {"shapes": "GPT", "tensors": len(params), "elements": elements, "device": device}
    case = CaseResult({**work, "optimizer": "AdamW", "dtypes": "float32"}, title)
    reference = next(result for result in results if result.name == REFERENCE)
    case.rows = [_row(result, reference, recipe.max_norm) for result in results]
    baseline = case.row(BASELINE)
    for row in case.rows:
        if baseline is not None and baseline.median_ms and row.median_ms:
            row.ratio = baseline.median_ms / row.median_ms
    case.rows += [RowResult(name, "failed", reason) for name, reason in failed.items()]
    return case


def _row(result: Result, reference: Result, max_norm: float) -> RowResult:
    pairs = zip(result.losses, reference.losses, strict=True)
    row = RowResult(result.name, difference=max(abs(a - b) for a, b in pairs))
    row.param_difference = result.param_difference
    row.final_loss = fmean(result.losses[-LAST_STEPS:])
    row.clipped = fmean(norm > max_norm for norm in result.norms)
    if not (row.difference or 0.0) <= CLOSE:
        row.fail("wrong", f"wrong by {row.difference:.1e} in the loss")
        return row
    timed = [1e3 * seconds for seconds in result.step_times[FIRST_STEPS:]]
    row.lower_ms, row.median_ms, row.upper_ms = quartiles(timed)
    if result.update_times:
        row.update_ms = 1e3 * quartiles(result.update_times[FIRST_STEPS:])[1]
    row.first_cold_s = sum(result.step_times[:FIRST_STEPS])
    return row
