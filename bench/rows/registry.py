"""The ways to clip and step that are compared, by the name of their row."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.rows.limit import Limit
from bench.rows.runs import ByHand, ClipAndStep, Compiled, InGraph, Ours, Run

BASELINE = "clip + fused"
LIMIT = "limit: moves the bytes"
OURS = "compileclip, multi_tensor"
ONE_GRAPH = "torch.compile, one graph"
STOCK_GRAPH = "clip + fused, CUDA graph"
OUR_GRAPH = "compileclip, CUDA graph"


@dataclass(frozen=True)
class Row:
    """A way to clip and step.

    Attributes:
        name: what tables call it.
        start: makes its run over a case's tensors; raises ``NotRunError`` where it cannot be.
        compiles: whether its first step compiles anything.
        per_tensor: whether that takes a time that grows with the number of tensors.
        only: the type of the only device that it is for, "" if it is for all.
    """

    name: str
    start: Callable[[Workload], Run]
    compiles: bool = False
    per_tensor: bool = False
    only: str = ""

    def check_compilation(self, tensors: int, most: int) -> None:
        """Raise ``NotRunError`` where it would be compiled for more than ``most`` tensors."""
        if self.per_tensor and tensors > most:
            raise NotRunError(
                f"compiling {tensors:,} tensors takes long (--compile-tensors {most})"
            )


_STOCK = partial(ClipAndStep, foreach=True, fused=True, capturable=True)
_OURS = partial(Ours, mode="multi_tensor", capturable=True)
# Another process is sent them, so ``start`` is no lambda.
ROWS = (
    # A GPU cannot queue its launches, and takes ten times as long as for the next row.
    Row("clip + for-loop", partial(ClipAndStep, foreach=False), only="cpu"),
    Row("clip + foreach", partial(ClipAndStep, foreach=True)),
    Row(BASELINE, partial(ClipAndStep, fused=True)),
    Row(STOCK_GRAPH, partial(InGraph, start=_STOCK), only="cuda"),
    Row("fused, grad_scale by hand", ByHand),
    Row("torch.compile, two calls", Compiled, compiles=True, per_tensor=True),
    Row(ONE_GRAPH, partial(Compiled, one_graph=True), compiles=True, per_tensor=True),
    Row("compileclip, eager", partial(Ours, mode="eager"), compiles=True),
    Row("compileclip, inductor", partial(Ours, mode="inductor"), compiles=True, per_tensor=True),
    Row(OURS, partial(Ours, mode="multi_tensor"), compiles=True),
    Row(OUR_GRAPH, partial(InGraph, start=_OURS), compiles=True, only="cuda"),
    Row(LIMIT, Limit),
)
NAMES = tuple(row.name for row in ROWS)


def choose(text: str) -> tuple[Row, ...]:
    """The rows whose name holds one of the parts of ``text`` between commas.

    A part that is a name is for that row alone.

    Raises:
        ArgumentTypeError: a part is in no name.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not any(part in name for name in NAMES):
            names = "; ".join(NAMES)
            raise argparse.ArgumentTypeError(f"no row's name holds {part!r}; the rows are: {names}")
    chosen = {name for p in parts for name in NAMES if (name == p if p in NAMES else p in name)}
    return tuple(row for row in ROWS if row.name in chosen)


def for_device(chosen: Sequence[Row], device: str) -> tuple[Row, ...]:
    """Those of ``chosen`` that are for this device."""
    return tuple(row for row in chosen if row.only in ("", torch.device(device).type))
