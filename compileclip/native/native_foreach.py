"""A list of tensors on a GPU, gathered and worked on by one or two calls of native code.

``triton_foreach.py`` does the same by Triton's launcher. Once that has compiled a kernel for such
tensors, the kernel is launched without it here: one copy of addresses, sizes and chunks, and a
launch each for the norm's shares, the norm, and what is written. Tensors are of one dtype and
contiguous, or are left to ``triton_foreach.py``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from compileclip.native import cuda_driver
from compileclip.native.cuda_driver import Driver, Entry, Launch
from compileclip.native.native_tensors import Library, address, library

CHUNK = 16384  # elements, as in triton_norm.py, whose import loads the compiler
WRITERS = {"scale", "clip", "clamp"}
_entries: dict[tuple[object, ...], Entry] = {}


@dataclass(frozen=True)
class Task:
    """What is to be done with a list.

    Attributes:
        norm_type: the order of the norm that is to be taken, or None.
        kind: of the writing kernel of ``triton_scale.py``, or None.
        bound: as there.
        number: 0-dim, as there, where no norm is taken.
        from_grads: whether the gradients of the list's tensors are meant, where they have one.
        dtype: of the norm, if not ``total_dtype``.
    """

    norm_type: float | None = None
    kind: str | None = None
    bound: float = 0.0
    number: Tensor | None = None
    from_grads: bool = False
    dtype: torch.dtype | None = None

    def out(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the norm of tensors of ``dtype``."""
        return self.dtype or total_dtype(dtype)

    def keys(self, tensor: Tensor) -> list[tuple[object, ...] | None]:
        """Of the three kernels, for tensors like ``tensor``; None for what is not launched."""
        device, dtype = tensor.device, tensor.dtype
        out = self.out(dtype) if self.number is None else self.number.dtype
        norm, kind = self.norm_type, self.kind
        given = out if kind != "clamp" else torch.int64  # it reads none
        return [
            None if norm is None else (device, dtype, norm, "shares"),
            None if norm is None else (device, dtype, norm, out),
            None if kind is None else (device, dtype, kind, given),
        ]


def total_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the norm of tensors of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def remember(task: Task, tensor: Tensor, launches: Sequence[Launch]) -> None:
    """Keep the kernels of ``launches``, which did ``task`` with tensors like ``tensor``."""
    keys = [key for key in task.keys(tensor) if key is not None]
    for key, launch in zip(keys, launches, strict=False):
        found = cuda_driver.entry(launch)
        if found is not None and len(launches) == len(keys):
            _entries[key] = found


@dataclass
class _Found:
    """``List`` of the native code, filled."""

    native: array[int]
    held: list[array[int]] = field(default_factory=list)

    @property
    def counts(self) -> tuple[int, int]:
        """Of tensors, and of chunks."""
        return self.native[-2], self.native[-1]


def run(objects: list[Tensor], first: Tensor, task: Task) -> Tensor | None:
    """Do ``task``.

    Args:
        objects: tensors, or with ``task.from_grads`` those whose gradients are meant.
        first: one of those.
        task: what to do.

    Returns:
        The norm, or ``task.number``, or ``first``; None, and nothing was done, where native code
        does not serve the list.

    Raises:
        DriverError: the device's driver refuses.
    """
    entries = [None if key is None else _entries.get(key, key) for key in task.keys(first)]
    if any(isinstance(entry, tuple) for entry in entries):
        return None  # not yet compiled
    on_device = cuda_driver.of(first.device)
    if on_device is None:
        return None
    native = library()
    found = _gather(native, on_device, objects, first, task)
    if found is None:
        return None
    count, chunks = found.counts
    number = task.number
    if task.norm_type is not None:
        number = torch.empty((), dtype=task.out(first.dtype), device=first.device)
    # Shares have up to three sums of a chunk each.
    words = 2 * count + 4 * chunks
    place = torch.empty(words, dtype=torch.int64, device=first.device)
    kernels = array("q", [n for entry in entries for n in _kernel(entry)])
    where = place.data_ptr(), place.data_ptr() if number is None else number.data_ptr()
    struct, given = address(found.native), (objects, len(objects))
    launched = (address(kernels), task.bound, on_device.stream())
    status = native.launch_list(native.torch, struct, *given, *where, *launched)
    cuda_driver.check(status, "take a norm or scale gradients, of which some may be written")
    return first if number is None else number


def _gather(
    native: Library, on_device: Driver, objects: list[Tensor], first: Tensor, task: Task
) -> _Found | None:
    count = len(objects)
    held = [array("Q", bytes(8 * count)), array("q", bytes(8 * count))]
    writes = task.kind is not None
    types = id(Tensor), id(Parameter)
    numbers = (CHUNK, task.from_grads, writes, *map(address, held), 0, 0)
    struct = array("q", [on_device.native, *native.plain(first), *types, *numbers])
    if native.gather_list(native.torch, address(struct), objects, count) or not struct[-1]:
        return None
    return _Found(struct, held)


def _kernel(entry: Entry | tuple[object, ...] | None) -> tuple[int, ...]:
    if not isinstance(entry, Entry):
        return 0, 0, 0, 0
    return entry.function, entry.threads, entry.shared, entry.scratch
