"""The limit on a GPU: two launches, as a norm and an update have, that move bytes."""

from __future__ import annotations

from typing import Any

import torch

# triton has no annotations, and where it is missing nothing is to be ignored. A kernel's arguments
# have types of triton's alone; its constants have names in capitals.
import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

BLOCK = 2048  # 4-byte words per program: four 16-byte loads per thread
WORD = 4
MOST = 4 * 2**30  # bytes of both buffers; beyond, the time per byte no longer changes


@triton.jit(do_not_specialize=["zero"])  # type: ignore[untyped-decorator, unused-ignore]
def _move(source, target, out, zero, target_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Update the blocks of ``target``, read those of ``source``; both are whole blocks."""
    block = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK)
    if block < target_blocks:
        at = target + block * BLOCK + words
        tl.store(at, tl.load(at) ^ zero)
    else:
        read = block - target_blocks
        tl.store(out + read, tl.xor_sum(tl.load(source + read * BLOCK + words), 0))


class Move:
    """Moves bytes on ``device``.

    Attributes:
        scale: what the time is to be multiplied by, where not all bytes are moved.
    """

    def __init__(self, device: torch.device, source_bytes: int, target_bytes: int) -> None:
        moved = min(1.0, MOST / (source_bytes + target_bytes))
        self.scale = 1 / moved
        words: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.source, self.target = (
            # Zeros may be moved faster than what a step moves.
            torch.randint(-(2**31), 2**31, (_blocks(moved * size) * BLOCK,), **words)
            for size in (source_bytes, target_bytes)
        )
        self._out = torch.empty(len(self.source) // BLOCK, dtype=torch.int32, device=device)

    def __call__(self) -> None:
        """Read the source; then read it again, and update the target."""
        self._launch(0)
        self._launch(len(self.target) // BLOCK)

    def _launch(self, target_blocks: int) -> None:
        grid = (target_blocks + len(self._out),)
        kernel: Any = _move[grid]
        kernel(self.source, self.target, self._out, 0, target_blocks, BLOCK=BLOCK, num_warps=4)


def _blocks(size: float) -> int:
    return -(-round(size) // (BLOCK * WORD))
