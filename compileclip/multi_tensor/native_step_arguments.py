"""What native code is told of a step, for ``native_step.py``: the structs of its C++, as arrays."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.pointers import Surroundings
from compileclip.eager.eager_step import Scaler
from compileclip.lowering.cpp.cpp_norm import native_norm
from compileclip.lowering.plain_tensors import CODES
from compileclip.native import cuda_driver
from compileclip.native.cuda_driver import Driver, Entry, Launch
from compileclip.native.native_tensors import address, library
from compileclip.settings import ClipSettings

if TYPE_CHECKING:
    from compileclip.buckets.bucket_step import BucketStep
    from compileclip.buckets.step_plan import Plan
    from compileclip.multi_tensor.step_norm import StepNorm
    from compileclip.recording.scalar_formula import Formula

_GIVEN = 3  # tensors that may be others in each step: the norm, a GradScaler's factor and verdict
# Of 0-dim state that a host counts: whether it is float64.
COUNTED = {torch.float32: False, torch.float64: True}


@dataclass(frozen=True)
class Last:
    """A step that was, and may be like the next.

    Attributes:
        settings: how it clipped.
        scaler: what a ``GradScaler`` said of it.
        kernels: of its ``works``.
        norm: its total norm.
        launches: for each of its works.
    """

    optimizer: Optimizer
    settings: ClipSettings
    scaler: Scaler
    plan: Plan
    works: Sequence[BucketStep]
    kernels: Sequence[Any]
    norm: StepNorm
    launches: Sequence[list[Launch]]

    @property
    def total(self) -> Tensor:
        """Of ``norm``."""
        return self.norm.total


@dataclass(frozen=True)
class Numbers:
    """How a bucket's scalars are found, and where they go."""

    formula: Formula
    group: int
    values: dict[str, Any]  # of the bucket
    scalars: slice  # of ``floats``
    counts: slice
    before: slice  # counts, as the last step left them


@dataclass
class Native:
    """``Steady`` of the native code, and what it points to."""

    address: int
    numbers: list[Numbers]
    floats: array[float]
    driver: Driver | None
    tensors: list[Tensor]  # on the device, of ours
    held: list[Any]


def native_step(last: Last, captured: bool) -> Native | None:
    """``Steady`` of steps like ``last``; None where Triton has to launch, or torch takes the norm.

    Args:
        last: the step.
        captured: whether CUDA graphs write addresses to where kernels find them, too.
    """
    parts = _Parts(last)
    target = last.works[0].place.target
    device = _on_host(parts) if target.waits else _on_device(parts, target.driver)
    return None if device is None else parts.native(device, captured)


class _Parts:
    """What native code is told of a step, as arrays."""

    def __init__(self, last: Last) -> None:
        self.last = last
        self.driver: Driver | None = None
        self.given = array("Q", bytes(8 * _GIVEN))
        self.held: list[Any] = [last, self.given]
        self.numbers: list[Numbers] = []
        first = 0
        for work, kernel in zip(last.works, last.kernels, strict=True):
            formula, bucket = work.formula, work.bucket
            assert formula is not None
            middle = first + len(kernel.program.scalars)
            end = middle + len(formula.names)
            last_one = 2 * end - middle
            places = slice(first, middle), slice(middle, end), slice(end, last_one)
            self.numbers.append(Numbers(formula, bucket.group, bucket.values, *places))
            first = last_one
        self.floats = array("d", bytes(8 * first))
        for each in self.numbers:
            known = (each.values[name] for name in each.formula.names)
            self.floats[each.before] = array("d", known)

    def keep(self, numbers: Iterable[int], kind: str = "q") -> int:
        """The address of an array, which is kept."""
        self.held.append(array(kind, numbers))
        return address(self.held[-1])

    def items(self, structs: Iterable[Sequence[int]]) -> tuple[int, int]:
        """``Array``."""
        structs = list(structs)
        return len(structs), self.keep(chain.from_iterable(structs))

    def scalar(self, work: int, index: int) -> int:
        """Where a scalar of a bucket is."""
        first: int = self.numbers[work].scalars.start
        return address(self.floats) + 8 * (first + index)

    def native(self, device: Sequence[int], captured: bool) -> Native:
        """Put the parts together."""
        last, tables = self.last, [work.table for work in self.last.works]
        counts = chain.from_iterable(map(self._counts, range(len(tables))))
        surroundings = last.plan.surroundings
        assert isinstance(surroundings, Surroundings)
        whole = (
            surroundings.native,
            *self.items([(table.native,) for table in tables]),
            *self.items(counts),
            *self.items(map(self._moved, last.works)),
            address(self.given),
            *(last.settings.write_grads is True, captured),
            *device,
        )
        found = {id(t): t for each in _launches(last) for t in each.args if isinstance(t, Tensor)}
        for other in (last.total, last.scaler.grad_scale, last.scaler.found_inf):
            found.pop(id(other), None)
        tensors = [t for t in found.values() if t.is_cuda]
        return Native(self.keep(whole), self.numbers, self.floats, self.driver, tensors, self.held)

    def _counts(self, work: int) -> list[tuple[int, ...]]:
        bucket, numbers = self.last.works[work].bucket, self.numbers[work]
        found: list[tuple[int, ...]] = []
        for name, (buffer, version) in bucket.versions.items():
            written = (0, 0, 0, 0, 0)
            if not bucket.stays:
                index = numbers.formula.names.index(name)
                starts = numbers.counts.start, numbers.before.start
                places = (address(self.floats) + 8 * (start + index) for start in starts)
                written = (buffer.data_ptr(), buffer.numel(), COUNTED[buffer.dtype], *places)
            found.append((id(buffer), version, *written))
        return found

    def _moved(self, work: BucketStep) -> tuple[int, ...]:
        table, n = work.table, len(work.bucket.params)
        now = address(table.addresses) + 8 * table.grads.start
        there = self.keep(table.addresses[table.grads], "Q")
        on_device = isinstance(work.resident, Tensor)
        place = work.resident.data_ptr() + 8 * table.grads.start if on_device else 0
        return now, there, place, n


def _launches(last: Last) -> list[Launch]:
    """In their order."""
    return [*last.norm.launches, *chain.from_iterable(last.launches)]


def _on_device(parts: _Parts, on_device: Driver | None) -> list[int] | None:
    """The last fields of ``Steady`` on a GPU; None where Triton has to launch."""
    norm, works = parts.last.norm.launches, parts.last.launches
    if on_device is None or not norm:
        return None
    entries = {id(each): cuda_driver.entry(each) for each in _launches(parts.last)}
    if None in entries.values():
        return None
    parts.driver = on_device
    given = (parts.last.total, parts.last.scaler.grad_scale, parts.last.scaler.found_inf)
    places = {id(tensor): address(parts.given) + 8 * i for i, tensor in enumerate(given)}
    found = [_launch(parts, each, entries[id(each)], places, []) for each in norm]
    # The update is launched bucket by bucket, from the last to the first.
    for index, launches in reversed(list(enumerate(works))):
        count = len(parts.last.kernels[index].program.scalars)
        scalars = [parts.scalar(index, i) for i in range(count)]
        for each, numbers in zip(launches, (scalars, []), strict=False):
            found.append(_launch(parts, each, entries[id(each)], places, numbers))
    return [on_device.native, *parts.items(found), *[0] * 9]


def _launch(
    parts: _Parts, launch: Launch, entry: Entry | None, places: dict[int, int], scalars: list[int]
) -> list[int]:
    """``Launch``; its last arguments are at ``scalars``, and tensors of ``places`` there."""
    assert entry is not None
    args = launch.args[: len(launch.args) - len(scalars)]
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    cells = parts.keep([*values, 0], "q")  # the last is for scratch memory, of which there is none
    where = [places.get(id(a), cells + 8 * i) for i, a in enumerate(args)]
    pointers = parts.keep([*where, *scalars, *[cells + 8 * len(args)] * entry.scratch])
    return [entry.function, launch.programs, entry.threads, entry.shared, pointers]


def _on_host(parts: _Parts) -> list[int] | None:
    """The last fields of ``Steady`` on a CPU; None where torch takes the norm."""
    last, plan = parts.last, parts.last.plan
    norm = native_norm(plan.dtypes, last.settings.norm_type)
    if norm is None:
        return None
    lists = map(address, (plan.grads, plan.sizes, plan.first_chunk))
    (dtype,) = plan.dtypes
    is_max = last.settings.norm_type == math.inf
    taken = (norm, CODES[last.total.dtype], len(plan.sizes), *lists, CODES[dtype], is_max)
    updates = [_update(parts, index) for index in reversed(range(len(last.works)))]
    # What is soon over is not worth it: a gradient is held in the time of some hundred elements.
    run = sum(plan.sizes) >= max(_LEAST, _LEAST_EACH * len(plan.sizes))
    python = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in _PYTHON]
    others = run, *python, *library().holders
    only_finite = last.settings.nonfinite != "propagate"
    return [0, 0, 0, parts.keep(taken), *parts.items(updates), only_finite, *others]


_LEAST, _LEAST_EACH = 1 << 16, 1 << 12  # elements, for other threads to run
_PYTHON = (ctypes.pythonapi.PyEval_SaveThread, ctypes.pythonapi.PyEval_RestoreThread)


def _update(parts: _Parts, index: int) -> list[int]:
    work, kernel = parts.last.works[index], parts.last.kernels[index]
    at = kernel.values.index("norm") if "norm" in kernel.values else -1
    read = {"max_norm": work.place.max_norm, "norm": parts.last.total}
    values = parts.keep([read[name].data_ptr() for name in kernel.values], "Q")
    lists = [address(each) for each in work.extent]
    table, n = address(work.table.addresses), len(work.bucket.params)
    return [kernel.entry, table, n, *lists, parts.scalar(index, 0), values, at]
