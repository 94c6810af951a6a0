"""The total norm of many tensors on a GPU: one launch per dtype, and one that adds up.

Each Triton program takes the share of one chunk, in float64 and in an order that only the shape
decides, into a place of its own; one more program adds the shares in their order. Nothing is
accumulated through atomics, so a result does not depend on which program ran first.

Squares of float32 and narrower neither overflow nor vanish in float64. Those of float64 may, so
there a share has three sums, as in J. L. Blue, "A Portable Fortran Program to Find the Euclidean
Norm of a Vector" (1978): of small elements scaled up, of large ones scaled down, and of the others.
A maximum is taken over the bits of absolute values, which are in the order of the values; NaN
stands above infinity there, so it comes through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor

from compileclip.lowering.triton.triton_lists import block_list
from compileclip.lowering.triton.triton_norm_kernels import add_shares, take_shares
from compileclip.native.cuda_driver import Launch

CHUNK = 16384  # elements per program of the first launch
_FIRST = {"num_warps": 4, "enable_fp_fusion": False}
SECOND = {"num_warps": 16, "enable_fp_fusion": False}
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

ORDERS = {1.0: "values", 2.0: "squares", math.inf: "max"}


@dataclass(frozen=True)
class List:
    """N tensors of one dtype without gaps, on one device.

    Attributes:
        addresses: int64 ``[N]``.
        sizes: int64 ``[N]``: how many elements each has.
        blocks: ``block_list`` of the sizes in blocks of ``CHUNK``.
        dtype: float32, float64, float16 or bfloat16.
    """

    addresses: Tensor
    sizes: Tensor
    blocks: Tensor
    dtype: torch.dtype


class Shares:
    """A total norm in the making: what each chunk contributes, and where the norm is to be.

    Attributes:
        total: 0-dim, float64 if one of the lists is and else float32; holds the norm once ended.
        constants: of the kernels that end it.
        launches: what was launched for it.
    """

    def __init__(
        self, lists: Sequence[List], norm_type: float, dtype: torch.dtype | None = None
    ) -> None:
        """Take the shares of ``lists``, at least one, on the current stream.

        Args:
            lists: on one device.
            norm_type: 1, 2 or infinity.
            dtype: of the norm, if not that of ``total``.
        """
        self.constants, self._count = _constants(lists, norm_type), 0
        self.launches: list[Launch] = []
        device = lists[0].sizes.device
        count = sum(len(each.blocks) for each in lists)
        double = any(each.dtype == torch.float64 for each in lists)
        shape = (3 if self.constants["SCALED"] else 1, count)
        with torch.cuda.device_of(lists[0].sizes):
            self.total = torch.empty((), dtype=dtype or _dtype(double), device=device)
            self._shares = torch.empty(shape, dtype=torch.float64, device=device)
            for each in lists:
                if len(each.blocks):
                    self._take(each, norm_type, count)
        if not count:
            self.total.zero_()

    @classmethod
    def ended(cls, total: Tensor, norm_type: float = 2.0) -> Shares:
        """A norm that is there; for one of that order, no other kernel is compiled."""
        made = cls.__new__(cls)
        made.launches = []
        order, double = ORDERS.get(norm_type, "squares"), total.dtype == torch.float64
        scaled = double and order == "squares"
        made.constants, made._count, made.total = {"ORDER": order, "SCALED": scaled}, 0, total
        made._shares = torch.empty((), dtype=torch.float64, device=total.device)
        return made

    @property
    def left_open(self) -> list[Launch]:
        """What took the shares, as long as nothing has ended the norm."""
        return self.launches if self._count else []

    @property
    def open(self) -> tuple[Tensor, Tensor, int]:
        """What a kernel takes that ends it: the shares, the total and how many shares are left."""
        return self._shares, self.total, self._count

    def note_ended(self) -> None:
        """A kernel that was launched ends it."""
        self._count = 0

    def end(self) -> Tensor:
        """The norm, ended by a kernel of its own where nothing has done so."""
        if self._count:
            with torch.cuda.device_of(self.total):
                constants = {**self.constants, **SECOND}
                self.launches.append(Launch(add_shares, 1, self.open, constants))
                self.launches[-1].run()
            self.note_ended()
        return self.total

    def _take(self, each: List, norm_type: float, count: int) -> None:
        tensors = (each.addresses, each.sizes, each.blocks, self._shares)
        types = {"DTYPE": TYPES[each.dtype], "WIDE": _wide(each.dtype, norm_type)}
        constants = {**types, "CHUNK": CHUNK, **self.constants, **_FIRST}
        args = (*tensors, self._count, count)
        self.launches.append(Launch(take_shares, len(each.blocks), args, constants))
        self.launches[-1].run()
        self._count += len(each.blocks)


def _constants(lists: Sequence[List], norm_type: float) -> dict[str, Any]:
    double = any(each.dtype == torch.float64 for each in lists)
    return {"ORDER": ORDERS[norm_type], "SCALED": double and norm_type == 2}


def _dtype(double: bool) -> torch.dtype:
    return torch.float64 if double else torch.float32


def _wide(dtype: torch.dtype, norm_type: float) -> Any:
    """What shares are taken in; a maximum rounds nothing, and one in float64 is slow."""
    exact = math.isinf(norm_type) and dtype != torch.float64
    return tl.float32 if exact else tl.float64


def chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes and ``block_list`` on the device, copied there without waiting.

    They are new at each call: those of another call may be on another stream, or in the memory of a
    CUDA graph that is being prepared.
    """
    host = _host_chunks(sizes, device.type)
    return host[0].to(device, non_blocking=True), host[1].to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _host_chunks(sizes: tuple[int, ...], kind: str) -> tuple[Tensor, Tensor]:
    blocks = block_list(sizes, CHUNK)
    pin = kind == "cuda" and len(blocks) > 0
    numbers = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    return (numbers.pin_memory(), blocks.pin_memory()) if pin else (numbers, blocks)
