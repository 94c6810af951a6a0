"""Triton kernels compiled for GPUs that are not there, and what their code says.

It stands in for private parts of triton, read in triton 3.7.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import offline_cuda
import torch
import triton
from triton.backends.compiler import GPUTarget

from compileclip.lowering.program import Program, dtype_of
from compileclip.lowering.triton.triton_kernel import AMD_OPTIONS, BLOCK, OPTIONS
from compileclip.lowering.triton.triton_lists import block_list
from compileclip.lowering.triton.triton_module import load
from compileclip.lowering.triton.triton_norm import SECOND
from compileclip.lowering.triton.triton_source import source

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
_LABELS = r"^\s*(?:\$L__BB\d+_\d+|\.LBB\d+_\d+):"
_BRANCHES = r"^.*\b(?:bra|s_cbranch_\w+|s_branch)\b.*$"
_BITS = {"ushort": 16, "short": 16, "ubyte": 8, "byte": 8, "dword": 32}


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to: PTX, or AMD's assembly."""

    target: str
    text: str

    @property
    def kernels(self) -> int:
        """How many kernels it holds."""
        return len(re.findall(r"\.visible \.entry|^\s*\.amdhsa_kernel", self.text, re.MULTILINE))

    @property
    def accesses(self) -> list[tuple[str, int]]:
        """Each "load" and "store" of global memory, with its bits."""
        return list(_accesses(self.text))

    @property
    def widest(self) -> Code:
        """The basic blocks with accesses of 128 bits: the main loop, without the tail."""
        blocks = re.split(f"{_LABELS}|{_BRANCHES}", self.text, flags=re.MULTILINE)
        wide = [b for b in blocks if any(bits == 128 for _, bits in _accesses(b))]
        return Code(self.target, "\n".join(wide))

    @property
    def spilled(self) -> int:
        """Bytes or registers that did not fit into registers."""
        if self.target.startswith("gfx"):
            kinds = r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size)"
            counts = re.findall(kinds + r":\s+(\d+)", self.text)
            assert len(counts) >= 3
            return sum(map(int, counts))
        (name,) = re.findall(r"^\.target (\w+)", self.text, re.MULTILINE)
        done = subprocess.run(
            [_PTXAS, "-v", f"--gpu-name={name}", "-o", "/dev/null", "-"],
            input=self.text,
            capture_output=True,
            text=True,
            check=True,
        )
        kinds = r"(\d+) bytes (?:stack frame|spill stores|spill loads)"
        counts = re.findall(kinds, done.stderr)
        assert len(counts) >= 3, done.stderr
        return sum(map(int, counts))


def _accesses(text: str) -> Iterator[tuple[str, int]]:
    for kind, lanes, bits in re.findall(r"\b(ld|st)\.global\.(?:v(\d)\.)?b(\d+)", text):
        yield "load" if kind == "ld" else "store", int(lanes or 1) * int(bits)
    for kind, unit, lanes in re.findall(
        r"\b(?:global|flat|buffer|scratch)_(load|store)_(dword|u?short|u?byte)(?:x(\d))?", text
    ):
        yield kind, _BITS[unit] * int(lanes or 1)


def compile_for(target: str, kernel: Any, *arguments: Any, **options: Any) -> Code:
    """What a launch of a ``triton.jit`` kernel would compile on a GPU of ``target``."""
    triton.runtime.driver.set_active(_Driver(target))
    try:
        asm = kernel.warmup(*arguments, grid=(1,), **options).asm
    finally:
        triton.runtime.driver._active = None
    return Code(target, asm["amdgcn" if target.startswith("gfx") else "ptx"])


def compile_program(target: str, made: Program) -> Code:
    """What an update of one tensor would compile."""
    table, sizes = torch.zeros(len(made.operands), 1, dtype=torch.int64), torch.zeros(1).long()
    step = load(source(made).text).compileclip_step
    arguments = (table, sizes, block_list([1], BLOCK), torch.zeros(9).long(), 1)
    return compile_for(target, step, *arguments, BLOCK=BLOCK, **options_for(target))


def compile_once(target: str, made: Program) -> Code:
    """What is compiled of a program for what is one for all tensors."""
    scalars = [n.meta["val"] for n in made.scalars]
    values = [torch.zeros((), dtype=dtype_of(n)) for n in made.values if n.target != "norm"]
    norm = next((dtype_of(n) for n in made.values if n.target == "norm"), torch.float32)
    counts = [torch.zeros(1, dtype=dtype_of(n)) for n in made.counts]
    shares, total = torch.zeros(1, 1).double(), torch.zeros((), dtype=norm)
    given = (shares, total, 1, torch.zeros(9).long(), 1, *values, *counts, *scalars)
    constants = {"ORDER": "squares", "SCALED": norm == torch.float64}
    once = load(source(made).text).compileclip_once
    return compile_for(target, once, *given, **constants, **SECOND)


def options_for(target: str) -> dict[str, Any]:
    """Those of a launch there."""
    amd = target.startswith("gfx")
    return {**(AMD_OPTIONS if amd else OPTIONS), "PACKED": not amd}


class _Driver(offline_cuda._Driver):
    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)  # a kernel is compiled once per device
