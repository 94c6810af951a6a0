"""What runs a bucket's kernels: C++ on a CPU, Triton on a GPU, behind one set of functions."""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from compileclip.fallback import warn_fallback
from compileclip.lowering import UnsupportedError, cpp, norm, threads
from compileclip.program import Program

if TYPE_CHECKING:
    from compileclip.plan import Plan
    from compileclip.work import Work


class Addresses(Protocol):
    """Of a bucket's tensors, as ``gather.Table`` has them."""

    addresses: array[int]
    grads: slice


class Target(Protocol):
    """A kind of device.

    Attributes:
        device: where the tensors are.
        waits: whether what is launched is done when the call returns.
    """

    device: torch.device
    waits: bool

    def is_capturing(self) -> bool:
        """Whether what is launched now becomes part of a graph instead of being run."""

    def kernel(self, program: Program) -> Any:
        """``program``, compiled."""

    def extent(self, sizes: array[int]) -> Any:
        """The numbers of elements of a bucket's tensors, as launches take them."""

    def resident(self, table: Addresses) -> Any:
        """A bucket's addresses, operand by operand, as launches take them."""

    def refresh(self, resident: Any, table: Addresses) -> None:
        """Take over the gradients' addresses, of what ``resident`` returned; nothing waits."""

    def launch(
        self,
        kernel: Any,
        resident: Any,
        extent: Any,
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
    ) -> None:
        """Run a kernel on a bucket, in place.

        Args:
            kernel: what ``kernel`` returned.
            resident: what ``resident`` returned.
            extent: what ``extent`` returned.
            scalars: of the program, in their order.
            values: 0-dim tensors on ``device`` by their names in the program.
            counts: of what the program counts, the tensors to store it to, by name.
        """

    def total_norm(self, plan: Plan, works: Sequence[Work], norm_type: float) -> Tensor | None:
        """The norm of all gradients of the buckets of ``plan``; None where there is no kernel.

        Where there is, the counts of the buckets that stay on the device are ``seen`` as well.
        """


def of(device: torch.device) -> Target:
    """The target for tensors on ``device``.

    Raises:
        UnsupportedError: there is none.
    """
    if device.type == "cpu":
        return Cpu()
    if device.type != "cuda":
        raise UnsupportedError(f"there are no kernels for {device.type} tensors")
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("triton is not installed")
    return Gpu(device)


class Cpu:
    """C++ kernels on torch's number of threads."""

    device = torch.device("cpu")
    waits = True

    def is_capturing(self) -> bool:
        """It never is."""
        return False

    def kernel(self, program: Program) -> cpp.Kernel:
        """See ``Target``."""
        return cpp.Kernel(program)

    def extent(self, sizes: array[int]) -> tuple[array[int], array[int]]:
        """The sizes, and the running sum of numbers of chunks."""
        return sizes, norm.first_chunks(sizes)

    def resident(self, table: Addresses) -> array[int]:
        """Nothing is to be done."""
        return table.addresses

    def refresh(self, resident: array[int], table: Addresses) -> None:
        """Nothing is to be done."""

    def launch(
        self,
        kernel: cpp.Kernel,
        resident: array[int],
        extent: tuple[array[int], array[int]],
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
    ) -> None:
        """See ``Target``."""
        read = [values[name].data_ptr() for name in kernel.values]
        kernel(resident, *extent, scalars, read, threads())

    def total_norm(self, plan: Plan, works: Sequence[Work], norm_type: float) -> Tensor | None:
        """As ``get_total_norm`` takes it, to the bit: in the order of the parameters."""
        if len(plan.dtypes) != 1 or not plan.dtypes <= norm.SERVED.get(norm_type, set()):
            return None
        (dtype,) = plan.dtypes
        out = torch.empty((), dtype=torch.promote_types(dtype, torch.float32), device=self.device)
        extent = (plan.sizes, plan.first_chunk)
        args = (plan.grads, *extent, dtype, norm_type, threads())
        return out if norm.norm_into(out, *args) else None


class Gpu:
    """Triton kernels on the current stream."""

    waits = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._takes_norm = True

    def is_capturing(self) -> bool:
        """See ``Target``."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def kernel(self, program: Program) -> Any:
        """See ``Target``."""
        from compileclip.lowering import triton  # it loads the compiler

        return triton.Kernel(program)

    def extent(self, sizes: array[int]) -> dict[str, Tensor]:
        """The sizes, and the lists of blocks of the update and the norm."""
        from compileclip.lowering.triton import block_list, on_device
        from compileclip.lowering.triton_norm import CHUNK

        return {
            "sizes": on_device(sizes, self.device),
            "blocks": block_list(sizes).to(self.device),
            "chunks": block_list(sizes, CHUNK).to(self.device),
        }

    def resident(self, table: Addresses) -> Tensor:
        """See ``Target``; it stays where it is, for a CUDA graph reads it again."""
        from compileclip.lowering.triton import on_device, write_addresses

        resident = on_device(table.addresses, self.device)
        # By the kernel that a capture takes: there is no compiling then.
        write_addresses(resident[table.grads], table.addresses[table.grads])
        return resident

    def refresh(self, resident: Tensor, table: Addresses) -> None:
        """See ``Target``."""
        from compileclip.lowering.triton import pinned, write_addresses

        addresses, place = table.addresses[table.grads], resident[table.grads]
        if self.is_capturing():  # a replay would copy what then is in the host's memory
            write_addresses(place, addresses)
        else:
            place.copy_(pinned(addresses, self.device), non_blocking=True)

    def launch(
        self,
        kernel: Any,
        resident: Tensor,
        extent: dict[str, Tensor],
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
    ) -> None:
        """See ``Target``."""
        read = [values[name] for name in kernel.values]
        stored = [counts[name] for name in kernel.program.counted]
        kernel(resident, extent["sizes"], extent["blocks"], scalars, read, stored)

    def total_norm(self, plan: Plan, works: Sequence[Work], norm_type: float) -> Tensor | None:
        """Bucket by bucket."""
        from compileclip.lowering.triton_norm import ORDERS, List, norm_of

        if norm_type not in ORDERS or not self._takes_norm:
            return None
        lists = [
            List(
                work.resident[work.table.grads],
                work.extent["sizes"],
                work.extent["chunks"],
                work.bucket.dtypes["grad"],
            )
            for work in works
        ]
        try:
            return norm_of(lists, norm_type, self._pairs(plan))
        except Exception as error:  # of a compiler that another torch brings
            self._takes_norm = False
            warn_fallback("the norm's kernel", f"its first run failed: {error}", "report it")
            return None

    def _pairs(self, plan: Plan) -> Tensor:
        """The counts of the buckets that stay here, and where they are ``seen``."""
        if plan.words is None:
            from compileclip.lowering.triton_norm import words_of

            buckets = [table.bucket for table in plan.tables]
            pairs = [(b.counts[name], seen) for b in buckets for name, seen in b.seen.items()]
            plan.words = words_of(pairs, self.device)
        return plan.words
