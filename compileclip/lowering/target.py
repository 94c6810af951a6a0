"""What a kind of device has to offer for a bucket's kernels to run on it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from compileclip.lowering.program import Program
from compileclip.native.cuda_driver import Driver, Launch

if TYPE_CHECKING:
    from compileclip.buckets.bucket_step import BucketStep
    from compileclip.buckets.step_plan import Plan


class Addresses(Protocol):
    """Of a bucket's tensors, as ``pointers.Table`` has them."""

    addresses: array[int]
    grads: slice


class Norm(Protocol):
    """A total norm, which the first kernel of an update may be left to end.

    Attributes:
        total: 0-dim; holds the norm, in the order of what is launched, once it is ended.
        left_open: what was launched for it, as long as that does not end it.
    """

    total: Tensor

    @property
    def left_open(self) -> list[Launch]:  # noqa: D102  see there
        ...

    def end(self) -> Tensor:
        """``total``, ended now if it was not."""


@dataclass
class Ended:
    """A norm that is there."""

    total: Tensor
    left_open: list[Launch] = field(default_factory=list)

    def end(self) -> Tensor:
        """See ``Norm``."""
        return self.total


class Target(Protocol):
    """A kind of device.

    Attributes:
        device: where the tensors are.
        waits: whether what is launched is done when the call returns.
        driver: what can launch without Triton, on a GPU.
    """

    device: torch.device
    waits: bool
    driver: Driver | None

    def is_capturing(self) -> bool:
        """Whether what is launched now becomes part of a graph instead of being run."""

    def kernel(self, program: Program) -> Any:
        """``program``, compiled."""

    def extent(self, sizes: array[int]) -> Any:
        """The numbers of elements of a bucket's tensors, as launches take them."""

    def resident(self, table: Addresses) -> Any:
        """A bucket's addresses, operand by operand, as launches take them."""

    def refresh(self, resident: Any, table: Addresses) -> Any:
        """Take over the gradients' addresses, of what ``resident`` returned; nothing waits.

        Returns:
            What has to live as long as a CUDA graph that is being captured.
        """

    def launch(
        self,
        kernel: Any,
        resident: Any,
        extent: Any,
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        norm: Norm,
    ) -> list[Launch]:
        """Run a kernel on a bucket, in place.

        Args:
            kernel: what ``kernel`` returned.
            resident: what ``resident`` returned.
            extent: what ``extent`` returned.
            scalars: of the program, in their order.
            values: tensors on ``device`` by their names in the program, of which the first element
                counts; all but the norm.
            counts: of what the program counts, the tensors to store it to, by name.
            norm: the total norm, on ``device``; ended afterwards.

        Returns:
            What was launched on a GPU.
        """

    def total_norm(
        self,
        plan: Plan,
        works: Sequence[BucketStep],
        norm_type: float,
        dtype: torch.dtype | None = None,
    ) -> Norm | None:
        """The norm of all gradients of the buckets of ``plan``; None where there is no kernel.

        Args:
            plan: what is gathered.
            works: its buckets.
            norm_type: the order p.
            dtype: of the norm, if not that of ``get_total_norm``.
        """
