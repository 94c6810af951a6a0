"""Programs as Triton kernels: one launch updates every tensor of a bucket, on a GPU.

A kernel finds its tensors in a table of addresses. Each block of ``BLOCK`` elements is one Triton
program; a full block of aligned tensors runs without masks, so that its loads are 16 bytes wide,
and every other block with them. The host's scalars are kernel arguments annotated as float64,
which Triton neither rounds nor specialises on: nothing is compiled again when they change.

Rounding is meant to be that of ATen's CUDA kernels, by their source (``DeviceAddCmulCdiv.cuh``,
``Lerp.h``, ``BinaryDivTrueKernel.cu``, ``PowKernel.cu``) and nvcc's defaults: a product and a sum
within one functor are contracted, division and square root are IEEE's, subnormals are kept. So:

* ``add``, ``sub``, ``rsub`` with alpha: ``fma(alpha, b, a)``
* ``lerp``: ``fma(weight, b - a, a)`` where ``|weight| < 0.5``, else ``fma(b - a, weight - 1, b)``
* ``addcmul``: ``fma(value, b * c, a)``, and ``fma(b, c, a)`` where value is 1
* ``addcdiv``: ``fma(value, b / c, a)``
* ``div`` by a scalar of the host: a product with its reciprocal, rounded in between
* ``pow``: products for 2, 3 and -2, ``sqrt``, ``rsqrt`` and ``reciprocal`` for 0.5, -0.5 and -1
* otherwise ``pow``, ``exp`` and ``log`` are those of the libdevice that Triton brings, without its
  contractions. torch's are of its CUDA version: the last bits of a ``pow`` may differ, and so those
  of ``beta ** step`` where step counts stay on the device
* float16 and bfloat16: each operation in float32, rounded once; their scalars are float32

Not yet compared with a GPU: ``tests/test_lowering_triton.py`` does it where there is one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compileclip.lowering.native import cache_folder
from compileclip.lowering.triton_ops import statements, to_dtype, triton_type, variable
from compileclip.program import Program, dtype_of

ARGUMENTS = 256  # addresses that one launch stores
BLOCK = 1024  # elements per Triton program: 8 per thread, two 16-byte loads of float32 in flight
# Contraction is written out where ATen has it, and libdevice keeps subnormals as nvcc's code does.
# As many registers as there are: left to itself, ptxas now and then spills one to have 64.
OPTIONS = {
    "num_warps": 4,
    "enable_fp_fusion": False,
    "enable_reflect_ftz": False,
    "maxnreg": 255,
}
# AMD's warps are twice as wide, and its backend does not have the last two options.
AMD_OPTIONS = {"num_warps": 2, "enable_fp_fusion": False}


_IMPORTS = (
    "import triton",
    "import triton.language as tl",
    "from triton.language.extra import libdevice",
    "",
    "from compileclip.lowering.triton_math import addcmul, lerp, maximum, minimum, power",
    "from compileclip.lowering.triton_math import quotient, reciprocal, sign, square_root",
)


class Kernel:
    """A program, ready to be launched over a bucket.

    Attributes:
        program: what it was made of.
        values: what ``program.values`` stand for.

    Args:
        program: its operands are float32, float64, float16 or bfloat16.

    Raises:
        UnsupportedError: there is no Triton code for an operation or a dtype.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values = [str(node.target) for node in program.values]  # a name may have been changed
        self._step = load(source(program)).compileclip_step

    def __call__(
        self,
        table: Tensor,
        sizes: Tensor,
        blocks: Tensor,
        scalars: Sequence[float],
        values: Sequence[Tensor],
        counts: Sequence[Tensor] = (),
    ) -> None:
        """Update N tensors on the current stream; nothing waits for the device.

        Args:
            table: int64 ``[operands, N]``, contiguous: the address of each tensor.
            sizes: int64 ``[N]``: how many elements each has.
            blocks: ``block_list`` of the sizes, on the device.
            scalars: in the order of ``program.scalars``.
            values: 0-dim tensors on the device, in the order of ``program.values``.
            counts: a tensor ``[N]`` for each of ``program.counted``, which it is stored to. None of
                them overlaps with ``values``: those are read while these are written.
        """
        count = blocks.shape[0]
        if count == 0:
            return
        with torch.cuda.device_of(table):
            arguments = (table, sizes, blocks, sizes.shape[0], *values, *counts, *scalars)
            options = OPTIONS if torch.version.hip is None else AMD_OPTIONS
            self._step[(count,)](*arguments, BLOCK=BLOCK, **options)


def block_list(sizes: Sequence[int], block: int = BLOCK) -> Tensor:
    """Which tensor each block belongs to, and which of its blocks it is: int32 ``[blocks, 2]``.

    Args:
        sizes: the number of elements of each tensor; one without elements has no block, but the
            first has where none has elements, for step counts are to be stored all the same.
        block: how many elements make a block.
    """
    counts = (torch.tensor(sizes, dtype=torch.int64, device="cpu") + (block - 1)) // block
    if len(counts) and not counts.any():
        counts[0] = 1
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(tensors)) - first[tensors]
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
        *_IMPORTS[:2],
        "",
        "",
        f"@triton.jit(do_not_specialize={['place', 'count', *names]!r})",
        f"def compileclip_write(place, count, {', '.join(f'{n}: tl.int64' for n in names)}):",
        *(f"    tl.store(place + {i}, {name}, mask={i} < count)" for i, name in enumerate(names)),
        "",
    ]
    return load("\n".join(lines)).compileclip_write


def source(program: Program) -> str:
    """The Python source of a program's kernel, ``compileclip_step``."""
    operands = [variable(n) for n in program.operands]
    types = {variable(n): triton_type(dtype_of(n)) for n in program.operands}
    values, scalars = [variable(n) for n in program.values], [variable(n) for n in program.scalars]
    counts = [f"count{i}" for i in range(len(program.counted))]
    stored = {n.name: n for n in program.operands}
    pairs = [(stored[s], n) for s, n in zip(program.stored, program.results, strict=True)]
    update = [
        "@triton.jit",
        f"def update({', '.join([*operands, *values, *scalars])}):",
        *(f"    {line}" for line in statements(program.graph)),
        f"    return ({', '.join(to_dtype(n, dtype_of(o)) for o, n in pairs)},)",
    ]
    written = [variable(o) for o, _ in pairs]
    pointers = ["table", "sizes", "blocks", "tensors", *(f"p{x}" for x in (*values, *counts))]
    typed = [*(f"{s}: tl.float64" for s in scalars), "BLOCK: tl.constexpr"]
    step = [
        f"@triton.jit(do_not_specialize={[*pointers, *scalars]!r})",
        f"def compileclip_step({', '.join([*pointers, *typed])}):",
        *(f"    {v} = tl.load(p{v})" for v in values),
        *_once(program, counts),
        "    block = tl.program_id(0).to(tl.int64) * 2",
        "    tensor = tl.load(blocks + block)",
        "    start = tl.load(blocks + block + 1).to(tl.int64) * BLOCK",
        "    size = tl.load(sizes + tensor)",
        # The row is 64 bits wide, as is the start above: there may be many tensors, and large ones.
        "    row = table + tensor",
        *(f"    a{name} = tl.load(row + tensors * {i})" for i, name in enumerate(operands)),
        f"    aligned = (({' | '.join(f'a{name}' for name in operands)}) & 15) == 0",
        "    offsets = start + tl.arange(0, BLOCK)",
        "    if aligned & (start + BLOCK <= size):",
        *_block("full", types, [*values, *scalars], written, aligned=True),
        "    else:",
        "        mask = offsets < size",
        *_block("tail", types, [*values, *scalars], written, aligned=False),
    ]
    return "\n".join([*_IMPORTS, "", "", *update, "", "", *step, ""])


def _once(program: Program, counts: list[str]) -> list[str]:
    """The lines for what is one for all tensors: whether to go on, and step counts."""
    nodes = [n for n in (*program.counts, program.condition) if n is not None]
    if not nodes:
        return []
    lines = statements(program.graph, nodes)
    if program.condition is not None:
        lines += [f"if {variable(program.condition)} == 0:", "    return"]
    if counts:
        # Each Triton program stores some of each list.
        lines += [
            "width = tl.num_programs(0).to(tl.int64) * BLOCK",  # 2**31 elements are 2**21 programs
            "for first in range(tl.program_id(0).to(tl.int64) * BLOCK, tensors, width):",
            "    which = first + tl.arange(0, BLOCK)",
        ]
        for name, node in zip(counts, program.counts, strict=True):
            lines.append(f"    tl.store(p{name} + which, {variable(node)}, mask=which < tensors)")
    return [f"    {line}" for line in lines]


def _block(
    name: str, types: dict[str, str], shared: list[str], written: list[str], aligned: bool
) -> list[str]:
    """The lines that load, update and store one block; names must not be those of the other."""
    mask = "" if aligned else ", mask=mask"
    lines = []
    for operand, dtype in types.items():
        pointer = f"a{operand}.to(tl.pointer_type({dtype}))"
        if aligned:
            pointer = f"tl.multiple_of({pointer}, 16)"
        lines.append(f"{name}_p{operand} = {pointer} + offsets")
    lines += [f"{name}{x} = tl.load({name}_p{x}{mask})" for x in types]
    results = ", ".join(f"{name}_new{x}" for x in written)
    lines.append(f"{results}, = update({', '.join([*(name + x for x in types), *shared])})")
    lines += [f"tl.store({name}_p{x}, {name}_new{x}{mask})" for x in written]
    return [f"        {line}" for line in lines]


@functools.cache
def load(text: str) -> ModuleType:
    """The module of a source; Triton reads the file again, so it stays in torch's cache."""
    key = hashlib.sha256(text.encode()).hexdigest()[:40]
    path = cache_folder() / f"{key}.py"
    if not path.exists() or path.read_text() != text:  # the latter: cut short
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="making-") as scratch:
            made = Path(scratch) / path.name
            made.write_text(text)
            with contextlib.suppress(OSError):
                os.replace(made, path)
    spec: Any = importlib.util.spec_from_file_location(f"compileclip_{key}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
