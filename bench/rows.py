"""The ways to clip and step that are compared, by the name of their row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.case import NotRunError
from bench.compiled_rows import OneGraph, TwoCalls
from bench.limit import Limit
from bench.optax_row import Optax
from bench.runs import ByHand, ClipAndStep, Ours, Run
from bench.workload import Workload

BASELINE = "clip + fused"
LIMIT = "limit: moves the bytes"
OURS = "compileclip, multi_tensor"


@dataclass(frozen=True)
class Row:
    """A way to clip and step.

    Attributes:
        name: what tables call it.
        start: makes its run over a case's tensors; raises ``NotRunError`` where it cannot be.
        compiles: whether its first step compiles anything.
        per_tensor: whether that takes a time that grows with the number of tensors.
    """

    name: str
    start: Callable[[Workload], Run]
    compiles: bool = False
    per_tensor: bool = False


ROWS = (
    Row("clip + for-loop", lambda work: ClipAndStep(work, foreach=False)),
    Row("clip + foreach", lambda work: ClipAndStep(work, foreach=True)),
    Row(BASELINE, lambda work: ClipAndStep(work, fused=True)),
    Row("fused, grad_scale by hand", ByHand),
    Row("torch.compile, two calls", TwoCalls, compiles=True, per_tensor=True),
    Row("torch.compile, one graph", OneGraph, compiles=True, per_tensor=True),
    Row("compileclip, eager", lambda work: Ours(work, "eager"), compiles=True),
    Row(
        "compileclip, inductor", lambda work: Ours(work, "inductor"), compiles=True, per_tensor=True
    ),
    Row(OURS, lambda work: Ours(work, "multi_tensor"), compiles=True),
    Row("optax, jax.jit", Optax, compiles=True, per_tensor=True),
    Row(LIMIT, Limit),
)
NAMES = tuple(row.name for row in ROWS)


def choose(patterns: Sequence[str]) -> tuple[Row, ...]:
    """The rows whose name holds one of ``patterns``; all of them if there is no pattern.

    Raises:
        ValueError: a pattern is in no name.
    """
    for pattern in patterns:
        if not any(pattern in name for name in NAMES):
            raise ValueError(f"no row's name holds {pattern!r}; the rows are: {'; '.join(NAMES)}")
    return tuple(row for row in ROWS if not patterns or any(p in row.name for p in patterns))


def check_compilation(row: Row, tensors: int, most: int) -> None:
    """Raise ``NotRunError`` where ``row`` would be compiled for more than ``most`` tensors."""
    if row.per_tensor and tensors > most:
        raise NotRunError(f"compiling {tensors:,} tensors takes long (--compile-tensors {most})")
