"""Clip and step alone: torch's two calls against ``compileclip.wrap``, interleaved in one process.

``python -m bench.step`` prints, for each list of parameter shapes and each optimizer, the median
milliseconds of both and their ratio, after it has checked that both make the same parameters.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm  # type: ignore[import-untyped]

import compileclip

Shapes = Sequence[tuple[int, ...]]
GPT2_LAYER: list[tuple[int, ...]] = [
    *[(768,)] * 4,
    (768, 2304),
    (2304,),
    (768, 768),
    (768,),
    (768, 3072),
    (3072,),
    (3072, 768),
    (768,),
]
SHAPES: dict[str, Shapes] = {
    "64 of 1024 x 1024": [(1024, 1024)] * 64,
    "2,000 of 32 x 32": [(32, 32)] * 2000,
    "1 of 1,000": [(1000,)],
    "GPT-2 small": [(50257, 768), (1024, 768), *GPT2_LAYER * 12, (768,), (768,)],
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=False),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-3),
}
MAX_NORM = 1.0
# Parameters may differ by roundings alone, over two steps.
CLOSE = 1e-5


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--optimizers", nargs="*", choices=list(OPTIMIZERS), default=None)
    parser.add_argument("--mode", default="auto")
    args = parser.parse_args(argv)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; medians of {args.repetitions}, interleaved"
    )
    rows = []
    chosen = [(shapes, name) for name in args.optimizers or OPTIMIZERS for shapes in args.shapes]
    for shapes, name in tqdm(chosen, disable=None):
        rows.append([shapes, name, *_compare(SHAPES[shapes], name, args.repetitions, args.mode)])
    headers = ["parameters", "optimizer", "torch ms", "compileclip ms", "ratio", "first step s"]
    print(tabulate(rows, headers, floatfmt=("", "", ".3f", ".3f", ".2f", ".2f")))


def _compare(shapes: Shapes, name: str, repetitions: int, mode: str) -> list[Any]:
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    stock = OPTIMIZERS[name](theirs)
    wrapped = compileclip.wrap(OPTIMIZERS[name](ours), MAX_NORM, mode=mode)

    def torch_step() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, MAX_NORM)
        stock.step()

    runs: list[tuple[list[Any], Callable[[], object], list[float]]]
    runs = [(theirs, torch_step, []), (ours, wrapped.step, [])]
    grads = [torch.randn(s) for s in shapes]
    first: list[float] = []
    for _ in range(2):
        for params, run, _times in runs:
            seconds = _timed(params, grads, run)
            if run != torch_step:
                first.append(seconds)
    worst = max(
        ((p - q).abs().max() / q.abs().max()).item() for p, q in zip(ours, theirs, strict=True)
    )
    if worst > CLOSE:
        return ["", "", f"wrong by {worst:.1e}", ""]
    for _ in range(repetitions):
        for params, run, times in runs:
            times.append(1e3 * _timed(params, grads, run))
    a, b = (statistics.median(times) for _, _, times in runs)
    return [a, b, a / b, first[0]]


def _timed(params: Sequence[Tensor], grads: Sequence[Tensor], run: Callable[[], object]) -> float:
    # New tensors each time, as backward makes them.
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
