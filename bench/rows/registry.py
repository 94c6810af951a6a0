"""The ways to clip and step that are compared, by the name of their row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.cases.case import NotRunError
from bench.cases.workload import Workload
from bench.rows import graph_rows
from bench.rows.compiled_rows import OneGraph, TwoCalls
from bench.rows.limit import Limit
from bench.rows.optax_row import Optax
from bench.rows.runs import ByHand, ClipAndStep, Ours, Run

BASELINE = "clip + fused"
LIMIT = "limit: moves the bytes"
OURS = "compileclip, multi_tensor"
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


ROWS = (
    # A GPU cannot queue its launches, and takes ten times as long as for the next row.
    Row("clip + for-loop", lambda work: ClipAndStep(work, foreach=False), only="cpu"),
    Row("clip + foreach", lambda work: ClipAndStep(work, foreach=True)),
    Row(BASELINE, lambda work: ClipAndStep(work, fused=True)),
    Row(STOCK_GRAPH, graph_rows.stock, only="cuda"),
    Row("fused, grad_scale by hand", ByHand),
    Row("torch.compile, two calls", TwoCalls, compiles=True, per_tensor=True),
    Row("torch.compile, one graph", OneGraph, compiles=True, per_tensor=True),
    Row("compileclip, eager", lambda work: Ours(work, "eager"), compiles=True),
    Row(
        "compileclip, inductor", lambda work: Ours(work, "inductor"), compiles=True, per_tensor=True
    ),
    Row(OURS, lambda work: Ours(work, "multi_tensor"), compiles=True),
    Row(OUR_GRAPH, graph_rows.ours, compiles=True, only="cuda"),
    Row("optax, jax.jit", Optax, compiles=True, per_tensor=True, only="cpu"),
    Row(LIMIT, Limit),
)
NAMES = tuple(row.name for row in ROWS)


def choose(patterns: Sequence[str]) -> tuple[Row, ...]:
    """The rows whose name holds one of ``patterns``; all of them if there is no pattern.

    A pattern that is a name is for that row alone.

    Raises:
        ValueError: a pattern is in no name.
    """
    for pattern in patterns:
        if not any(pattern in name for name in NAMES):
            raise ValueError(f"no row's name holds {pattern!r}; the rows are: {'; '.join(NAMES)}")
    chosen = {name for p in patterns for name in NAMES if (name == p if p in NAMES else p in name)}
    return tuple(row for row in ROWS if not patterns or row.name in chosen)


def for_device(chosen: Sequence[Row], device: str) -> tuple[Row, ...]:
    """Those of ``chosen`` that are for this device."""
    return tuple(row for row in chosen if row.only in ("", torch.device(device).type))


def check_compilation(row: Row, tensors: int, most: int) -> None:
    """Raise ``NotRunError`` where ``row`` would be compiled for more than ``most`` tensors."""
    if row.per_tensor and tensors > most:
        raise NotRunError(f"compiling {tensors:,} tensors takes long (--compile-tensors {most})")
