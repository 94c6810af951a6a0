"""Time of clip and step of sharded parameters, in turns with torch's: gloo ranks on a CPU.

python tests/distributed/time_over_ranks.py [--world 2] [--tensors 200 2000] [--rounds 30]

The parameters are FSDP2's, of 32 x 32 elements; their gradients are those of one backward.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rank_pool import RankPool
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_

import compileclip

ROWS = ("clip + foreach AdamW", "clip + fused AdamW", "compileclip")


class Squares(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.all = nn.ParameterList([torch.randn(32, 32) for _ in range(tensors)])

    def forward(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.all]).sum()


def stepper(row: str, tensors: int) -> Callable[[], Any]:
    """One row's clip and step."""
    torch.manual_seed(0)
    model = Squares(tensors)
    fully_shard(model)
    model().backward()
    params = list(model.parameters())
    fused = "fused" in row
    opt: Any = torch.optim.AdamW(
        params, lr=1e-4, fused=fused, foreach=True if "foreach" in row else None
    )
    if row == "compileclip":
        return compileclip.wrap(opt, 1.0).step

    def step() -> None:
        clip_grad_norm_(params, 1.0)
        opt.step()

    return step


def measure(tensors: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """When each row began and ended, by a clock that all processes share."""
    warnings.simplefilter("ignore")
    steps = {row: stepper(row, tensors) for row in ROWS}
    times: dict[str, list[tuple[float, float]]] = {row: [] for row in ROWS}
    for turn in range(rounds + 3):
        for row, step in steps.items():
            dist.barrier()
            start = time.monotonic()
            step()
            if turn >= 3:
                times[row].append((start, time.monotonic()))
    return times


def median_ms(found: list[dict[str, list[tuple[float, float]]]], row: str) -> float:
    """From when the last rank has begun until the last has ended: ranks leave a barrier apart."""
    each = zip(*(times[row] for times in found), strict=True)
    spans = [max(end for _, end in one) - max(start for start, _ in one) for one in each]
    return statistics.median(spans) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--tensors", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    pool, rows = RankPool(args.world), []
    for tensors in args.tensors:
        found = pool.run(measure, tensors, args.rounds, seconds=600)
        medians = {row: median_ms(found, row) for row in ROWS}
        best = min(medians[row] for row in ROWS[:2])
        shown = [f"{medians[row]:.2f}" for row in ROWS]
        rows.append([tensors, *shown, f"{best / medians['compileclip']:.1f}"])
    pool.stop()
    print(f"{args.world} gloo ranks, {platform.machine()}, torch {torch.__version__}; median ms")
    print(tabulate(rows, ["tensors", *ROWS, "the faster one / compileclip"], disable_numparse=True))


if __name__ == "__main__":
    main()
