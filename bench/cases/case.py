"""A case: a list of shapes, a dtype, an optimizer and a device; and the memory that it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.cases.shapes import Shape, label
from bench.rows.optimizers import OPTIMIZERS, has

GIB = 2**30
# Of parameters, gradients and state.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
        """Of parameters, gradients and state."""
        return DTYPES[self.dtypes]

    def make_optimizer(self, params: Iterable[Tensor], **implementation: bool) -> Optimizer:
        """The optimizer over ``params``; of ``foreach``, ``fused`` ..., what its class has."""
        own = {name: v for name, v in implementation.items() if has(self.optimizer, name)}
        made: Optimizer = OPTIMIZERS[self.optimizer](params, **own)
        return made

    @property
    def elements(self) -> int:
        """Of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def title(self) -> str:
        """One line for people."""
        count = len(self.shapes)
        size = f"{self.elements:,} parameters in {count:,} tensor{'s' * (count != 1)}"
        return f"{label(self.name)} ({size}), {self.optimizer}, {self.dtypes}, {self.device}"

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
    # Parameters, state and gradients, twice: as they are and as they were; on a CPU once more for
    # the limit. Then two lists of temporary results of a step of foreach.
    copies = 3 if case.device == "cpu" else 2
    needed = case.elements * case.dtype.itemsize * (copies * (2 + states) + 2)
    free = free_memory(torch.device(case.device))
    if needed > free:
        raise NotRunError(f"needs {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free")


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated; a container has a limit of its own."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    available = re.search(r"MemAvailable:\s+(\d+)", _text("/proc/meminfo"))
    machine = 1024.0 * int(available.group(1)) if available else math.inf
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    container = float(limit) - float(used) if limit.isdigit() and used.isdigit() else math.inf
    return min(machine, container)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
