"""A case: a list of shapes, a dtype, an optimizer and a device; and the memory that it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases.shapes import Shape, label
from bench.rows.optimizers import OPTIMIZERS, Recipe

GIB = 2**30
# By the name that the command line takes: the dtypes of parameters and gradients, and of state.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16+float32": (torch.bfloat16, torch.float32),
}
DTYPE_LABELS = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "bfloat16+float32": "bfloat16 with float32 state",
}


class NotRunError(RuntimeError):
    """Why a row or a case is not measured, in a line for the user."""


@dataclass(frozen=True)
class Case:
    """What is stepped: every row of a case does the same work."""

    name: str
    shapes: tuple[Shape, ...]
    optimizer: str
    dtypes: str
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and gradients."""
        return DTYPES[self.dtypes][0]

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the optimizer's state."""
        return DTYPES[self.dtypes][1]

    @property
    def recipe(self) -> Recipe:
        """The optimizer's class and hyperparameters."""
        return OPTIMIZERS[self.optimizer]

    @property
    def elements(self) -> int:
        """Of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def title(self) -> str:
        """One line for people."""
        count = len(self.shapes)
        size = f"{self.elements:,} parameters in {count:,} tensor{'s' * (count != 1)}"
        return (
            f"{label(self.name)} ({size}), {self.optimizer}, "
            f"{DTYPE_LABELS[self.dtypes]}, {self.device}"
        )

    def to_json(self) -> dict[str, Any]:
        """What a result says about its case."""
        return {
            "shapes": self.name,
            "tensors": len(self.shapes),
            "elements": self.elements,
            "optimizer": self.optimizer,
            "dtypes": self.dtypes,
            "device": self.device,
        }


def check_device(device: str) -> None:
    """Raise ``NotRunError`` where ``device`` is not there."""
    try:
        torch.zeros(1, device=device).sum().item()
    # What a device that is not there raises differs from backend to backend.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise NotRunError(f"no device {device!r}: {reason}") from error


def check_memory(case: Case, states: int) -> None:
    """Raise ``NotRunError`` where a case is larger than the memory that is free.

    Args:
        case: what is to be measured.
        states: how many tensors of state the optimizer has per parameter.
    """
    size, state = case.dtype.itemsize, states * case.state_dtype.itemsize
    # Parameters, gradients as drawn, gradients of a step, state; then what a step of foreach takes
    # besides, two lists of temporary results of the larger dtype.
    needed = case.elements * (3 * size + state + 2 * max(size, case.state_dtype.itemsize))
    free = free_memory(torch.device(case.device))
    if needed > free:
        raise NotRunError(f"needs {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free")


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_meminfo(), _cgroup())


def _meminfo() -> float:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return 1024.0 * int(line.split()[1])
    return math.inf


def _cgroup() -> float:
    """What a container may still take."""
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or limit[0] == "max":
        return math.inf
    return float(limit[0]) - float(used[0])


def _lines(path: str) -> Sequence[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
