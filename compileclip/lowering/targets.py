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


class Target(Protocol):
    """A kind of device.

    Attributes:
        device: where the tensors are.
    """

    device: torch.device

    def is_capturing(self) -> bool:
        """Whether what is launched now becomes part of a graph instead of being run."""

    def kernel(self, program: Program) -> Any:
        """``program``, compiled."""

    def extent(self, sizes: array[int]) -> Any:
        """The numbers of elements of a bucket's tensors, as launches take them."""

    def upload(self, addresses: array[int]) -> Any:
        """A bucket's addresses, operand by operand, as launches take them; nothing waits."""

    def launch(
        self,
        kernel: Any,
        table: Any,
        extent: Any,
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
    ) -> None:
        """Run a kernel on a bucket, in place.

        Args:
            kernel: what ``kernel`` returned.
            table: what ``upload`` returned.
            extent: what ``extent`` returned.
            scalars: of the program, in their order.
            values: 0-dim tensors on ``device`` by their names in the program.
        """

    def total_norm(
        self, plan: Plan, tables: Sequence[Any], extents: Sequence[Any], norm_type: float
    ) -> Tensor | None:
        """The norm of all gradients of the buckets of ``plan``; None where there is no kernel."""


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

    def is_capturing(self) -> bool:
        """It never is."""
        return False

    def kernel(self, program: Program) -> cpp.Kernel:
        """See ``Target``."""
        return cpp.Kernel(program)

    def extent(self, sizes: array[int]) -> tuple[array[int], array[int]]:
        """The sizes, and the running sum of numbers of chunks."""
        return sizes, norm.first_chunks(sizes)

    def upload(self, addresses: array[int]) -> array[int]:
        """Nothing is to be done."""
        return addresses

    def launch(
        self,
        kernel: cpp.Kernel,
        table: array[int],
        extent: tuple[array[int], array[int]],
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
    ) -> None:
        """See ``Target``."""
        read = [values[name].data_ptr() for name in kernel.values]
        kernel(table, *extent, scalars, read, threads())

    def total_norm(
        self, plan: Plan, tables: Sequence[Any], extents: Sequence[Any], norm_type: float
    ) -> Tensor | None:
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

    def upload(self, addresses: array[int]) -> Tensor:
        """See ``Target``."""
        from compileclip.lowering.triton import on_device

        return on_device(addresses, self.device)

    def launch(
        self,
        kernel: Any,
        table: Tensor,
        extent: dict[str, Tensor],
        scalars: Sequence[float],
        values: Mapping[str, Tensor],
    ) -> None:
        """See ``Target``."""
        read = [values[name] for name in kernel.values]
        kernel(table, extent["sizes"], extent["blocks"], scalars, read)

    def total_norm(
        self, plan: Plan, tables: Sequence[Any], extents: Sequence[Any], norm_type: float
    ) -> Tensor | None:
        """Bucket by bucket."""
        from compileclip.lowering.triton_norm import ORDERS, List, norm_of

        if norm_type not in ORDERS or not self._takes_norm:
            return None
        lists = []
        for table, uploaded, extent in zip(plan.tables, tables, extents, strict=True):
            row = list(table.bucket.dtypes).index("grad")
            n = len(table.bucket.params)
            addresses, dtype = uploaded[row * n : (row + 1) * n], table.bucket.dtypes["grad"]
            lists.append(List(addresses, extent["sizes"], extent["chunks"], dtype))
        try:
            return norm_of(lists, norm_type)
        except Exception as error:  # of a compiler that another torch brings
            self._takes_norm = False
            warn_fallback("the norm's kernel", f"its first run failed: {error}", "report it")
            return None
