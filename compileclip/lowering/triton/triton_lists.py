"""Lists of addresses, sizes and blocks, as kernels on a GPU take them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compileclip.lowering.triton.triton_module import load

ARGUMENTS = 256  # addresses that one launch stores


def block_list(sizes: Sequence[int], block: int) -> Tensor:
    """Which tensor each block belongs to, and which of its blocks it is: int32 ``[blocks, 2]``.

    Args:
        sizes: the number of elements of each tensor; one without elements has no block.
        block: how many elements make a block.
    """
    counts = (torch.tensor(sizes, dtype=torch.int64, device="cpu") + (block - 1)) // block
    tensors = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(tensors), device="cpu") - first[tensors]
    return torch.stack((tensors, within), 1).to(torch.int32)


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of numbers; the copy to a GPU waits for nothing."""
    return pinned(numbers, device).to(device, non_blocking=True)


def pinned(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor on the host, out of which a copy to ``device`` is not waited for."""
    if not len(numbers):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    kept = numbers if isinstance(numbers, array) else array("q", numbers)
    host = torch.frombuffer(kept, dtype=torch.int64)
    return host.pin_memory() if device.type == "cuda" else host.clone()


def write_addresses(place: Tensor, addresses: array[int]) -> None:
    """Store ``addresses`` to ``place``, out of kernels' arguments, which a CUDA graph keeps.

    Args:
        place: int64 ``[N]``, contiguous, on the device.
        addresses: N of them.
    """
    with torch.cuda.device_of(place):
        for first in range(0, len(addresses), ARGUMENTS):
            some = addresses[first : first + ARGUMENTS]
            count, filled = len(some), [*some, *[0] * (ARGUMENTS - len(some))]
            _writer()[(1,)](place[first:], count, *filled, num_warps=1)


@functools.cache
def _writer() -> Any:
    """The kernel of ``write_addresses``."""
    names = [f"a{i}" for i in range(ARGUMENTS)]
    lines = [
        "import triton",
        "import triton.language as tl",
        "",
        "",
        f"@triton.jit(do_not_specialize={['place', 'count', *names]!r})",
        f"def compileclip_write(place, count, {', '.join(f'{n}: tl.int64' for n in names)}):",
        *(f"    tl.store(place + {i}, {name}, mask={i} < count)" for i, name in enumerate(names)),
        "",
    ]
    return load("\n".join(lines)).compileclip_write
