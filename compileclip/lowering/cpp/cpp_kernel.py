"""A program as C++: one loop over all elements of all tensors of a bucket, on a CPU's threads.

What does not depend on the element (the scalars, the norm and what follows from it) is computed
once per launch. The elements are split into chunks as the norm splits them, so that a thread
updates what it has read for the norm; ``cpp_loop.py`` says in which order.
"""

from __future__ import annotations

import ctypes
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from compileclip.fallback import UnsupportedError
from compileclip.lowering.cpp import cpp_loop, cpp_ops, cpp_prelude
from compileclip.lowering.program import Program, dtype_of
from compileclip.native import native_build


class Kernel:
    """A program, compiled.

    Attributes:
        program: what it was made of.
        values: what ``program.values`` stand for.
        entry: the address of its function.

    Raises:
        UnsupportedError: the program holds an operation or a dtype without C++ code.
        native.CompilerError: there is no compiler, or it fails.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        if program.counted or program.conditional:
            raise UnsupportedError("a CPU keeps step counts and decisions on the host")
        self.values = [str(node.target) for node in program.values]  # a name may have been changed
        self._step = native_build.load(source(program)).step
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self._step.argtypes = (pointer, integer, pointer, pointer, pointer, pointer, ctypes.c_int)
        self._step.restype = None
        self.entry = ctypes.cast(self._step, pointer).value or 0

    def __call__(
        self,
        table: array[int],
        sizes: array[int],
        first_chunk: array[int],
        scalars: Sequence[float],
        values: Sequence[int],
        threads: int,
    ) -> None:
        """Run it on a bucket, in place.

        Args:
            table: for one of ``program.operands`` after the other, the addresses of its tensors'
                data as 64-bit integers. The tensors are dense, and no two of them overlap.
            sizes: how many elements each tensor has.
            first_chunk: the running sum of the tensors' numbers of chunks, from 0 on; one longer
                than ``sizes``.
            scalars: the values of ``program.scalars``.
            values: the addresses of ``program.values``.
            threads: how many to use at most. Thread t takes chunks ``t * total // threads`` up to
                ``(t + 1) * total // threads``.
        """
        floats, addresses = array("d", scalars), array("Q", values)
        self._step(
            table.buffer_info()[0],
            len(sizes),
            sizes.buffer_info()[0],
            first_chunk.buffer_info()[0],
            floats.buffer_info()[0],
            addresses.buffer_info()[0],
            threads,
        )


def source(program: Program) -> str:
    """The C++ code of a program."""
    return _Source(program).text()


class _Source:
    """C++ code under construction.

    Attributes:
        once: types, names and expressions computed once per launch: the members of ``Launch``.
        each: statements run for each element.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.once: list[tuple[str, str, str]] = []
        self.each: list[str] = []
        self._names: dict[Node, str] = {}
        self._numbers: dict[tuple[Node, str], str] = {}
        self._scalars = {node: index for index, node in enumerate(program.scalars)}
        for index, node in enumerate(program.values):
            memory, register = _types(dtype_of(node))
            address = f"reinterpret_cast<const {memory}*>(values[{index}])"
            self._names[node] = self._once(register, f"load({address})")
        for index, node in enumerate(program.operands):
            self._names[node] = f"x{index}"
            self.each.append(f"const {_types(dtype_of(node))[1]} x{index} = load(p{index} + i);")
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._compute(node)
        columns = {node.name: index for index, node in enumerate(program.operands)}
        for name, node in zip(program.stored, program.results, strict=True):
            self.each.append(f"store(p{columns[name]} + i, {self._names[node]});")

    def text(self) -> str:
        """All of it."""
        memory = [_types(dtype_of(node))[0] for node in self.program.operands]
        kinds = list(enumerate(memory))
        addresses = [f"reinterpret_cast<{kind}*>(table[{i} * tensors + %s])" for i, kind in kinds]
        fetches = [f"fetch(at < left ? p{i} + at : n{i} + (at - left));" for i, _ in kinds]
        parts = {
            **{name: str(number) for name, number in cpp_loop.NUMBERS.items()},
            "PRELUDE": cpp_prelude.PRELUDE,
            "MEMBERS": "\n".join(f"  {kind} {name};" for kind, name, _ in self.once),
            "PREPARE": "\n".join(f"  const {kind} {name} = {e};" for kind, name, e in self.once),
            "MEMBER_NAMES": ", ".join(name for _, name, _ in self.once),
            "POINTERS": ", ".join(f"{kind}* __restrict p{i}" for i, kind in kinds),
            "NEXT": ", ".join(f"const {kind}* n{i}" for i, kind in kinds),
            "TENSOR": ", ".join(f"{address} + from" % "tensor" for address in addresses),
            "NEXT_TENSOR": ", ".join(address % "next" for address in addresses),
            "LOCALS": "\n".join(f"  const {kind} {n} = launch.{n};" for kind, n, _ in self.once),
            "FETCH": "\n".join(f"    {line}" for line in fetches),
            "EACH": "\n".join(f"      {line}" for line in self.each),
        }
        return re.sub(r"\$(\w+)", lambda match: parts[match[1]], cpp_loop.FRAME)

    def _compute(self, node: Node) -> None:
        """Declare the value of an operation."""
        target = node.target
        function = cpp_ops.FUNCTIONS.get(target) if isinstance(target, OpOverload) else None
        if function is None:
            raise UnsupportedError(f"no C++ code for {target}")
        memory, register = _types(dtype_of(node))
        within = _compute_dtype(node)
        types = _types(within)
        values = [self._argument(function, name, value, within) for name, value in _inputs(node)]
        expression = f"op::{function}<{types[1]}, {types[0]}>({', '.join(values)})"
        if dtype_of(node) in cpp_ops.HALF and function not in cpp_ops.EXACT:
            expression = f"round_to<{memory}>({expression})"
        if node.meta["val"].dim() == 0:
            self._names[node] = self._once(register, expression)
        else:
            self._names[node] = f"y{len(self.each)}"
            self.each.append(f"const {register} {self._names[node]} = {expression};")

    def _argument(self, function: str, name: str, value: Any, within: torch.dtype) -> str:
        """An argument of an operation that computes in the dtype ``within``."""
        if name in ("condition", "mask"):
            within = torch.bool
        memory, kind = _types(within)
        if value is None:
            value = _default(name, within)
        if not isinstance(value, Node):
            text = f"static_cast<{kind}>({_literal(value)})"
        elif value in self._scalars:
            text = self._number(value, kind)
        else:
            text = f"static_cast<{kind}>({self._names[value]})"
        rounded = value in self._names and dtype_of(value) == within
        if within in cpp_ops.HALF and not rounded and (function, name) not in cpp_ops.WIDE:
            return f"round_to<{memory}>({text})"
        return text

    def _number(self, node: Node, kind: str) -> str:
        """A scalar of the host, converted once per launch."""
        if (node, kind) not in self._numbers:
            value = f"static_cast<{kind}>(scalars[{self._scalars[node]}])"
            self._numbers[node, kind] = self._once(kind, value)
        return self._numbers[node, kind]

    def _once(self, kind: str, expression: str) -> str:
        name = f"u{len(self.once)}"
        self.once.append((kind, name, expression))
        return name


def _inputs(node: Node) -> Iterator[tuple[str, Any]]:
    """The tensors and numbers of a call, by their names in the operation's schema."""
    assert isinstance(node.target, OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if any(kind in str(argument.type) for kind in ("Tensor", "number", "float")):
            given = node.args[index : index + 1] or (argument.default_value,)
            yield argument.name, node.kwargs.get(argument.name, given[0])


def _default(name: str, within: torch.dtype) -> float:
    """What stands for an argument that is left out: no bound, or what replaces NaN or infinity."""
    limits = torch.finfo(within)
    bounds = {"min": -math.inf, "max": math.inf, "posinf": limits.max, "neginf": limits.min}
    return bounds.get(name, 0.0)


def _compute_dtype(node: Node) -> torch.dtype:
    """The dtype that ATen converts the arguments of an operation to."""
    if dtype_of(node) != torch.bool or node.target in cpp_ops.MOVES:
        return dtype_of(node)
    # A comparison of one or two: a number gives way to a tensor's dtype.
    values: list[Any] = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in node.args]
    dtype: torch.dtype = torch.result_type(values[0], values[-1])
    return dtype


def _types(dtype: torch.dtype) -> tuple[str, str]:
    """The C++ types of a dtype, in memory and in registers."""
    if dtype not in cpp_ops.TYPES:
        raise UnsupportedError(f"no C++ code for {dtype}")
    return cpp_ops.TYPES[dtype]


def _literal(value: object) -> str:
    if not isinstance(value, (int, float)):
        raise UnsupportedError(f"no C++ code for the argument {value!r}")
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return float(value).hex()
