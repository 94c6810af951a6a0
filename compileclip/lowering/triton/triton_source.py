"""The Triton source of a program: one kernel for what is one for all tensors, and the update.

``compileclip_once`` ends the norm and computes what the step has but once: the clip coefficient,
step counts and what follows from them, whether the step counts. ``compileclip_step`` loads that
and updates one block of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from compileclip.lowering.program import Program, dtype_of
from compileclip.lowering.triton.triton_code import Code, Slot, convert, variable
from compileclip.lowering.triton.triton_ops import triton_type

SLOT = 8  # bytes
_COUNTS = 1024  # that are stored at a time

_MATH = "from compileclip.lowering.triton.triton_math import"
IMPORTS = (
    "import triton",
    "import triton.language as tl",
    "from triton.language.extra import libdevice",
    "",
    f"{_MATH} addcmul, frac, inverse, lerp, maximum, minimum, nan_to_num, narrowed",
    f"{_MATH} power, quotient, quotient_of_float16, reciprocal, root_of_half, sigmoid",
    f"{_MATH} sign, softplus, square_root, trunc, widened",
    "from compileclip.lowering.triton.triton_norm_kernels import ended_norm",
)


@dataclass(frozen=True)
class Source:
    """The Python source of a program's kernels.

    Attributes:
        text: holds ``compileclip_once`` and ``compileclip_step``.
        slots: how many numbers of ``SLOT`` bytes the one leaves for the other.
    """

    text: str
    slots: int


def source(program: Program) -> Source:
    """Write the kernels of ``program``.

    Raises:
        UnsupportedError: there is no Triton code for an operation or a dtype.
    """
    code = Code(program.graph)
    stored = {n.name: n for n in program.operands}
    pairs = [(stored[s], n) for s, n in zip(program.stored, program.results, strict=True)]
    results = [code.result(node, dtype_of(operand)) for operand, node in pairs]
    condition = None if program.condition is None else code.condition(program.condition)
    operands = [variable(n) for n in program.operands]
    slots = [slot.name for slot in code.slots]
    update = [
        "@triton.jit",
        f"def update({', '.join([*operands, *slots, 'PACKED: tl.constexpr'])}):",
        *(f"    {line}" for line in code.update),
        f"    return ({', '.join(results)},)",
    ]
    written = [variable(operand) for operand, _ in pairs]
    types = {variable(n): triton_type(dtype_of(n)) for n in program.operands}
    step = _step(code, types, written, condition)
    parts = (IMPORTS, _once(program, code), update, step)
    return Source("\n\n\n".join("\n".join(part) for part in parts) + "\n", len(code.slots))


def _once(program: Program, code: Code) -> list[str]:
    """The lines of ``compileclip_once``, which is one Triton program."""
    norm = [variable(n) for n in program.values if n.target == "norm"]
    scale = [variable(n) for n in program.values if n.target == "grad_scale"]
    others = [variable(n) for n in program.values if variable(n) not in norm]
    counts = [f"pcount{i}" for i in range(len(program.counted))]
    scalars = [variable(n) for n in program.scalars]
    pointers = ["shares", "total", "count", "slots", "tensors", *(f"p{x}" for x in others), *counts]
    typed = [*(f"{s}: tl.float64" for s in scalars), "ORDER: tl.constexpr", "SCALED: tl.constexpr"]
    lines = [
        *(f"{v} = tl.load(p{v})" for v in others),
        *(f"{s} = tl.full((), {s}, tl.float64)" for s in scalars),  # to the interpreter, a float
        f"ended = ended_norm(shares, total, count, {(scale or ['1.0'])[0]}, "
        f"{bool(scale)}, ORDER, SCALED)",
        *(f"{v} = ended" for v in norm),
        *code.once,
        *(
            f"tl.store({_place(i, slot)}, ({slot.text}).to({slot.stored}))"
            for i, slot in enumerate(code.slots)
        ),
        *_stored_counts(program, counts),
    ]
    return [
        f"@triton.jit(do_not_specialize={[*pointers, *scalars]!r})",
        f"def compileclip_once({', '.join([*pointers, *typed])}):",
        *(f"    {line}" for line in lines),
    ]


def _stored_counts(program: Program, counts: Sequence[str]) -> list[str]:
    """The lines that store step counts, where the step counts."""
    if not counts:
        return []
    lines = [
        # Each thread has read a count that another one is about to store.
        "tl.debug_barrier()",
        f"for first in range(0, tensors, {_COUNTS}):",
        f"    which = first + tl.arange(0, {_COUNTS})",
    ]
    for name, node in zip(counts, program.counts, strict=True):
        lines.append(f"    tl.store({name} + which, {variable(node)}, mask=which < tensors)")
    if program.condition is None:
        return lines
    asked = _asked(program.condition)
    return [f"if {asked}:", *(f"    {line}" for line in lines)]


def _asked(condition: Node) -> str:
    return convert(variable(condition), dtype_of(condition), torch.bool)


def _step(
    code: Code, types: dict[str, str], written: Sequence[str], condition: str | None
) -> list[str]:
    """The lines of ``compileclip_step``, of which each Triton program has one block."""
    pointers = ["table", "sizes", "blocks", "slots", "tensors"]
    shared = [slot.name for slot in code.slots]
    lines = [
        *(f"{slot.name} = {_loaded(i, slot)}" for i, slot in enumerate(code.slots)),
        *([] if condition is None else [f"if {condition} == 0:", "    return"]),
        "block = tl.program_id(0).to(tl.int64) * 2",
        "tensor = tl.load(blocks + block)",
        "start = tl.load(blocks + block + 1).to(tl.int64) * BLOCK",
        "size = tl.load(sizes + tensor)",
        # The row is 64 bits wide, as is the start above: there may be many tensors, and large ones.
        "row = table + tensor",
        *(f"a{name} = tl.load(row + tensors * {i})" for i, name in enumerate(types)),
        f"aligned = (({' | '.join(f'a{name}' for name in types)}) & 15) == 0",
        "offsets = start + tl.arange(0, BLOCK)",
        "if aligned & (start + BLOCK <= size):",
        *_block("full", types, shared, written, aligned=True),
        "else:",
        "    mask = offsets < size",
        *_block("tail", types, shared, written, aligned=False),
    ]
    typed = ["BLOCK: tl.constexpr", "PACKED: tl.constexpr"]
    return [
        f"@triton.jit(do_not_specialize={pointers!r})",
        f"def compileclip_step({', '.join([*pointers, *typed])}):",
        *(f"    {line}" for line in lines),
    ]


def _place(index: int, slot: Slot) -> str:
    return f"(slots + {index}).to(tl.pointer_type({slot.stored}))"


def _loaded(index: int, slot: Slot) -> str:
    text = f"tl.load({_place(index, slot)})"
    return f"{text} != 0" if slot.dtype == torch.bool else text


def _block(
    name: str, types: dict[str, str], shared: list[str], written: Sequence[str], aligned: bool
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
    given = [*(name + x for x in types), *shared, "PACKED"]
    lines.append(f"{results}, = update({', '.join(given)})")
    lines += [f"tl.store({name}_p{x}, {name}_new{x}{mask})" for x in written]
    return [f"    {line}" for line in lines]
