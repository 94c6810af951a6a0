"""What runs a bucket's kernels: C++ on a CPU, Triton on a GPU, behind one set of functions."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compileclip.fallback import UnsupportedError, warn_fallback
from compileclip.lowering import threads, why_no_kernels
from compileclip.lowering.cpp import cpp_kernel, cpp_norm
from compileclip.lowering.program import Program
from compileclip.lowering.target import Addresses, Ended, Norm, Target
from compileclip.native import cuda_driver
from compileclip.native.cuda_driver import Driver, Launch

if TYPE_CHECKING:
    from compileclip.buckets.bucket_step import BucketStep
    from compileclip.buckets.step_plan import Plan


def of(device: torch.device) -> Target:
    """The target for tensors on ``device``.

    Raises:
        UnsupportedError: there is none.
    """
    reason = why_no_kernels(device)
    if reason is not None:
        raise UnsupportedError(reason)
    return Cpu() if device.type == "cpu" else Gpu(device)


class Cpu:
    """C++ kernels on torch's number of threads."""

    device = torch.device("cpu")
    waits = True
    driver: Driver | None = None

    def is_capturing(self) -> bool:
        """It never is."""
        return False

    def kernel(self, program: Program) -> cpp_kernel.Kernel:
        """See ``Target``."""
        return cpp_kernel.Kernel(program)

    def extent(self, sizes: array[int]) -> tuple[array[int], array[int]]:
        """The sizes, and the running sum of numbers of chunks."""
        return sizes, cpp_norm.first_chunks(sizes)

    def resident(self, table: Addresses) -> array[int]:
        """Nothing is to be done."""
        return table.addresses

    def refresh(self, resident: array[int], table: Addresses) -> Any:
        """Nothing is to be done."""

    def launch(
        self,
        kernel: cpp_kernel.Kernel,
        resident: array[int],
        extent: tuple[array[int], array[int]],
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        norm: Norm,
    ) -> list[Launch]:
        """See ``Target``."""
        values = {**values, "norm": norm.end()}
        read = [values[name].data_ptr() for name in kernel.values]
        kernel(resident, *extent, scalars, read, threads())
        return []

    def total_norm(
        self,
        plan: Plan,
        works: Sequence[BucketStep],
        norm_type: float,
        dtype: torch.dtype | None = None,
    ) -> Norm | None:
        """As ``get_total_norm`` takes it, to the bit: in the order of the parameters."""
        if len(plan.dtypes) != 1 or not plan.dtypes <= cpp_norm.SERVED.get(norm_type, set()):
            return None
        (kind,) = plan.dtypes
        dtype = dtype or torch.promote_types(kind, torch.float32)
        out = torch.empty((), dtype=dtype, device=self.device)
        extent = (plan.sizes, plan.first_chunk)
        args = (plan.grads, *extent, kind, norm_type, threads())
        # In a mode that fakes tensors there is no memory to write.
        return Ended(out) if type(out) is Tensor and cpp_norm.norm_into(out, *args) else None


class Gpu:
    """Triton kernels on the current stream."""

    waits = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.driver: Driver | None = cuda_driver.of(device)
        self._takes_norm = True
        self._norm_type = 2.0  # of the last norm

    def is_capturing(self) -> bool:
        """See ``Target``."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def kernel(self, program: Program) -> Any:
        """See ``Target``."""
        from compileclip.lowering.triton import triton_kernel  # it loads the compiler

        return triton_kernel.Kernel(program)

    def extent(self, sizes: array[int]) -> Extent:
        """The sizes, and the lists of blocks of the update and the norm."""
        from compileclip.lowering.triton.triton_kernel import BLOCK
        from compileclip.lowering.triton.triton_lists import block_list, on_device
        from compileclip.lowering.triton.triton_norm import CHUNK

        return Extent(
            on_device(sizes, self.device),
            block_list(sizes, BLOCK).to(self.device),
            block_list(sizes, CHUNK).to(self.device),
        )

    def resident(self, table: Addresses) -> Tensor:
        """See ``Target``; it stays where it is, for a CUDA graph reads it again."""
        from compileclip.lowering.triton.triton_lists import on_device, write_addresses

        resident = on_device(table.addresses, self.device)
        if self.driver is None:  # by the kernel that a capture takes: there is no compiling then
            write_addresses(resident[table.grads], table.addresses[table.grads])
        return resident

    def refresh(self, resident: Tensor, table: Addresses) -> Any:
        """See ``Target``."""
        from compileclip.lowering.triton.triton_lists import pinned, write_addresses

        addresses, place = table.addresses[table.grads], resident[table.grads]
        capturing = self.is_capturing()  # a replay copies what then is in the host's memory
        if self.driver is not None:
            if capturing:
                return self.driver.copy_captured(place, addresses)
            self.driver.copy(place, addresses)
        elif capturing:
            write_addresses(place, addresses)
        else:
            place.copy_(pinned(addresses, self.device), non_blocking=True)
        return None

    def launch(
        self,
        kernel: Any,
        resident: Tensor,
        extent: Extent,
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        norm: Norm,
    ) -> list[Launch]:
        """See ``Target``."""
        from compileclip.lowering.triton.triton_kernel import Tables
        from compileclip.lowering.triton.triton_norm import Shares

        shares = norm if isinstance(norm, Shares) else Shares.ended(norm.end(), self._norm_type)
        slots = extent.slots_for(kernel)
        tables = Tables(resident, extent.sizes, extent.blocks, slots)
        launches: list[Launch] = kernel(tables, scalars, values, counts, shares)
        return launches

    def total_norm(
        self,
        plan: Plan,
        works: Sequence[BucketStep],
        norm_type: float,
        dtype: torch.dtype | None = None,
    ) -> Norm | None:
        """Bucket by bucket; not ended."""
        from compileclip.lowering.triton.triton_norm import ORDERS, List, Shares

        self._norm_type = norm_type
        if norm_type not in ORDERS or not self._takes_norm:
            return None
        lists = [
            List(
                work.resident[work.table.grads],
                work.extent.sizes,
                work.extent.chunks,
                work.bucket.dtypes["grad"],
            )
            for work in works
        ]
        try:
            return Shares(lists, norm_type, dtype)
        except Exception as error:  # of a compiler that another torch brings
            self._takes_norm = False
            warn_fallback("the norm's kernel", f"its first run failed: {error}", "report it")
            return None


@dataclass
class Extent:
    """What a GPU's launches take of a bucket besides addresses; CUDA graphs read it again.

    Attributes:
        sizes: the number of elements of each tensor.
        blocks: the list of blocks of the update.
        chunks: that of the norm.
    """

    sizes: Tensor
    blocks: Tensor
    chunks: Tensor

    def __post_init__(self) -> None:
        self._slots: dict[int, Tensor] = {}

    def slots_for(self, kernel: Any) -> Tensor:
        """Where the first kernel of ``kernel`` leaves numbers for its second, step by step."""
        count = kernel.slots
        if count not in self._slots:
            self._slots[count] = torch.empty(count, dtype=torch.int64, device=self.sizes.device)
        return self._slots[count]
