"""Train the same model on the same batches once per way to clip and step."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm  # type: ignore[import-untyped]  # it has no annotations

from bench.cases.gpt import GPT, GPTConfig, batches
from bench.rows.updates import (
    COMPILED,
    ONE_GRAPH,
    REFERENCE,
    UPDATES,
    Recipe,
    TrainingStep,
    Update,
    schedule,
)


@dataclass
class Result:
    """What a run left behind; lists have an element per step, times are in seconds.

    ``step_times`` is the whole training step, ``update_times`` its clip and step alone, which a
    training step in one graph does not have: there it is empty.
    ``param_difference`` is the largest, at the end, from the reference run of the same seed.
    """

    name: str
    seed: int
    losses: list[float]
    norms: list[float]
    step_times: list[float]
    update_times: list[float]
    param_difference: float


@dataclass
class Run:
    """A model in training."""

    name: str
    model: GPT
    update: Update | TrainingStep
    scheduler: LambdaLR
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    update_times: list[float] = field(default_factory=list)

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """Train on one batch, which lies on the model's device."""
        start = _now(tokens.device)
        if isinstance(self.update, TrainingStep):
            loss, norm = self.update.run(tokens, targets)
        else:
            loss = self.model(tokens, targets)
            loss.backward()
            before = _now(tokens.device)
            norm = self.update.clip_and_step()
            self.update_times.append(_now(tokens.device) - before)
            self.update.optimizer.zero_grad()
        self.scheduler.step()
        end = _now(tokens.device)
        # Tensors, read when training is over: a value read now would make the host wait.
        self.losses.append(loss.detach())
        self.norms.append(norm)
        self.step_times.append(end - start)

    def result(self, seed: int, reference: GPT) -> Result:
        """Read what was recorded, and compare the parameters with ``reference``'s."""
        pairs = zip(self.model.parameters(), reference.parameters(), strict=True)
        return Result(
            self.name,
            seed,
            torch.stack(self.losses).tolist(),
            torch.stack(self.norms).tolist(),
            self.step_times,
            self.update_times,
            max((p - q).abs().max().item() for p, q in pairs),
        )


def train(
    config: GPTConfig,
    recipe: Recipe,
    text: Tensor,
    device: torch.device,
    seed: int,
    names: Sequence[str] = tuple(UPDATES),
) -> tuple[list[Result], dict[str, str]]:
    """Train one run per name in ``names``, from the same weights on the same batches.

    The runs take turns step by step, so that whatever else the machine does meets all of them.

    Returns:
        The results in the order of ``names``, which hold ``REFERENCE``; and why others failed.
    """
    torch.compiler.reset()  # a further seed is no recompilation, of which there may be a few only
    torch.manual_seed(seed)
    weights = GPT(config)
    runs = [_start(name, weights, recipe, device) for name in names]
    failed: dict[str, str] = {}
    drawn = batches(text, config.block, recipe.batch, seed)
    # In a file each refresh stays, so let there be few.
    interval = 0.1 if sys.stderr.isatty() else 15.0
    with tqdm(total=recipe.steps, desc=f"seed {seed}", unit="step", mininterval=interval) as bar:
        for _ in range(recipe.steps):
            tokens, targets = (t.to(device) for t in next(drawn))
            runs = [run for run in runs if _step(run, tokens, targets, bar, failed)]
            bar.set_postfix_str(f"loss {runs[0].losses[-1].item():.3f}", refresh=False)
            bar.update()
    reference = next(run.model for run in runs if run.name == REFERENCE)
    with torch.no_grad():
        return [run.result(seed, reference) for run in runs], failed


def _start(name: str, weights: GPT, recipe: Recipe, device: torch.device) -> Run:
    model = copy.deepcopy(weights).to(device)
    update = UPDATES[name](model, recipe)
    return Run(name, model, update, schedule(update.optimizer, recipe.steps))


def _step(run: Run, tokens: Tensor, targets: Tensor, bar: tqdm, failed: dict[str, str]) -> bool:
    """Take a step of ``run``, and say whether it is to go on."""
    if run.name in (COMPILED, ONE_GRAPH) and not run.losses:
        bar.set_postfix_str(f'compiling the row "{run.name}", a minute or two')
    try:
        run.step(tokens, targets)
    # No C++ compiler, no header files of Python, no memory: the other rows go on.
    except Exception as error:
        if run.name == REFERENCE:
            raise
        failed[run.name] = str(error).strip().partition("\n")[0] or type(error).__name__
        tqdm.write(f'The row "{run.name}" is left out: {failed[run.name]}', file=sys.stderr)
        return False
    return True


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
