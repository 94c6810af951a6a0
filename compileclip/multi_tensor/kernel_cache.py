"""The kernels of an optimizer on a device: each is compiled once, and its first use is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket_step import BucketStep
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.fallback import UnsupportedError
from compileclip.lowering.program import Program
from compileclip.lowering.target import Target
from compileclip.multi_tensor.self_check import check
from compileclip.recording.program_builder import Kind, assemble
from compileclip.recording.recorder import Recording
from compileclip.recording.shadow import NotPointwiseError, failed

# What is known of a program in this process is known to all optimizers: the kernels of each, and of
# which classes one was checked. Many small wrappers, as backward hooks need them, start quickly so.
_made: dict[Any, Any] = {}
_checked: set[Any] = set()


class DeviceKernels:
    """Those of one optimizer on one device.

    Attributes:
        target: what runs them.
        max_norm: the bound to which they clip, 0-dim float64 on the device.
    """

    def __init__(self, optimizer: Optimizer, target: Target) -> None:
        self.target = target
        self.max_norm = torch.zeros((), dtype=torch.float64, device=target.device)
        self._optimizer = optimizer
        self._used: set[Any] = set()

    @property
    def compilations(self) -> int:
        """How many programs there are, each of which was compiled once in this process."""
        return len(self._used)

    def knows(self, work: BucketStep, kind: Kind) -> bool:
        """Whether there is a kernel of this step of a bucket that has been checked."""
        return (id(work.recording), kind) in work.kernels

    def of(
        self,
        work: BucketStep,
        kind: Kind,
        scalars: list[float],
        before: Mapping[str, Any],
        read: Mapping[str, Tensor],
    ) -> Any:
        """The kernel of this step of a bucket.

        Args:
            work: the bucket, whose ``scalars`` were just asked for.
            kind: what the kernel is to do besides.
            scalars: of this step.
            before: the bucket's ``values`` before this step.
            read: what the kernel reads from memory, "norm" included.

        Raises:
            NotPointwiseError: it does not do what the optimizer's own step does.
            UnsupportedError: there is no code for it, or it cannot be run.
            CompilerError: it cannot be compiled.
        """
        key = (id(work.recording), kind)
        if key not in work.kernels:
            if self.target.is_capturing():
                raise UnsupportedError("a step in a CUDA graph is another than all before it")
            kernel = self._kernel(work, kind)
            checked = (type(self._optimizer), id(kernel))  # which ``_made`` keeps
            if checked not in _checked or not is_torchs_own(self._optimizer):
                self._check(work, kernel, scalars, before, read)
                _checked.add(checked)
            work.kernels[key] = kernel
        return work.kernels[key]

    def _kernel(self, work: BucketStep, kind: Kind) -> Any:
        recording = work.recording
        new = {k: v.dtype for k, v in work.made.items() if isinstance(v, Tensor) and v.dim() > 0}
        dtypes = work.bucket.dtypes | new
        key = (self.target.device, recording.key, tuple(dtypes.items()), kind)
        if key not in _made:
            _made[key] = self.target.kernel(_assembled(recording, dtypes, kind))
        self._used.add(key)
        return _made[key]

    def _check(
        self,
        work: BucketStep,
        kernel: Any,
        scalars: list[float],
        before: Mapping[str, Any],
        read: Mapping[str, Tensor],
    ) -> None:
        args = (self._optimizer, work.bucket, self.target, kernel, scalars, before)
        try:
            check(*args, {**read, **work.values})
        except NotPointwiseError:
            raise
        except Exception as error:
            raise UnsupportedError(f"a kernel's first run failed: {error}") from error


def _assembled(recording: Recording, dtypes: Mapping[str, torch.dtype], kind: Kind) -> Program:
    try:
        return assemble(recording, dtypes, kind)
    except (NotPointwiseError, UnsupportedError):
        raise
    except Exception as error:  # tensors where the operation has numbers
        raise failed(error) from error
