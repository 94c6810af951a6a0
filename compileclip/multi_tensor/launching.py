"""The launches of a step in mode ``multi_tensor``, bucket by bucket, and what they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket_step import BucketStep
from compileclip.eager.eager_step import Scaler
from compileclip.multi_tensor.step_norm import StepNorm
from compileclip.native.cuda_driver import Launch
from compileclip.recording.program_builder import Kind


def kernels_of(
    works: Sequence[BucketStep],
    kind: Kind,
    scalars: Sequence[list[float]],
    saved: Sequence[Mapping[str, Any]],
    norm: StepNorm,
    scaler: Scaler,
) -> list[Any]:
    """The kernels of a step of ``works``, whose ``scalars`` were just asked for.

    Args:
        works: the buckets.
        kind: what kernels are to do besides.
        scalars: of this step, those of each bucket.
        saved: the buckets' ``values`` before it.
        norm: the total norm, which is ended where a kernel is new.
        scaler: what a ``GradScaler`` says of the step.

    Raises:
        NotPointwiseError, UnsupportedError, CompilerError: as ``DeviceKernels.of``.
    """
    found = []
    for work, numbers, before in zip(works, scalars, saved, strict=True):
        read = _read(work, scaler)
        if not work.place.knows(work, kind):  # it will be checked
            read["norm"] = norm.value().to(work.place.target.device)
        found.append(work.place.of(work, kind, numbers, before, read))
    return found


def launch(
    works: Sequence[BucketStep],
    kernels: Sequence[Any],
    scalars: Sequence[list[float]],
    kind: Kind,
    norm: StepNorm,
    scaler: Scaler,
) -> list[list[Launch]]:
    """Update parameters and their state, and tell autograd; see ``kernels_of``.

    Returns:
        What was launched for each of ``works``.
    """
    launches = []
    # Last in the norm, first in the update: what was read last is still in the cache.
    for work, kernel, found in reversed(list(zip(works, kernels, scalars, strict=True))):
        target, values = work.place.target, {**_read(work, scaler), **work.values}
        args = (kernel, work.resident, work.extent, found, values, work.bucket.counts)
        given = norm.on(target.device, "grad_scale" in kernel.values)
        launches.append(target.launch(*args, given))
        norm.note_launched()
        work.table.note_written(grads=kind.insert.write_grads)
    return launches[::-1]


def keep(optimizer: Optimizer, works: Sequence[BucketStep]) -> None:
    """Take over what the step of each bucket left besides tensors of its parameters' shape."""
    groups = optimizer.param_groups
    for index, changes in works[0].elsewhere.items():
        if all(work.bucket.group != index for work in works):  # these know by themselves
            groups[index].update(changes)
    for work in works:
        work.keep_state()
        work.bucket.advance(work.state)
        groups[work.bucket.group].update(work.changes)


def _read(work: BucketStep, scaler: Scaler) -> dict[str, Tensor]:
    """What a kernel reads from memory besides the norm and what is the bucket's own."""
    return {"max_norm": work.place.max_norm, **scaler.on(work.place.target.device)}
