"""What a code object reads and writes that is not its own, by its instructions.

Read in CPython 3.10 to 3.14: the names of instructions.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM")
_EXCHANGES, _COPIES = ("SWAP", "ROT_TWO"), ("COPY", "DUP_TOP")
_WRITES = {
    "STORE_GLOBAL": "sets the global",
    "DELETE_GLOBAL": "deletes the global",
    "DELETE_ATTR": "deletes the attribute",
    "IMPORT_NAME": "imports",
}


@dataclass(frozen=True)
class Accesses:
    """Those of a code object and the functions defined in it.

    Attributes:
        writes: what it does to others, in words.
        own: the attributes that it sets of its first argument, as methods do.
        globals: names that are looked up in globals, each with attributes taken of it in turn.
        names: of attributes, whosever they are.
        texts: constants that may be names of attributes.
        rebound: names of outer functions' variables that it sets.
    """

    writes: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    globals: dict[tuple[str, ...], None] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)
    rebound: set[str] = field(default_factory=set)


@lru_cache(maxsize=2048)
def accesses_of(code: CodeType) -> Accesses:
    """What ``code`` accesses."""
    found = Accesses()
    for each in _nested(code):
        _add(found, each, _first(each) if each is code else None)
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _add(found: Accesses, code: CodeType, first: str | None) -> None:
    done: list[dis.Instruction] = []
    chain: tuple[str, ...] = ()
    found.texts.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    for each in _instructions(code):
        name, value = each.opname, each.argval
        if name in _ATTRIBUTE:
            if not chain:
                found.names.add(value)
        elif chain:
            found.globals[chain] = None
        if name in _GLOBAL:
            chain = (value,)
        elif name in _ATTRIBUTE and chain:
            chain = (*chain, value)
        else:
            chain = ()
        if name in _WRITES:
            found.writes.append(f"{_WRITES[name]} {value!r}")
        elif name in ("STORE_DEREF", "DELETE_DEREF"):
            found.rebound.add(value)
        elif name == "STORE_ATTR":
            found.names.add(value)  # it may be a property
            if first is not None and _target(done, value) == first:
                found.own.append(value)
            else:
                found.writes.append(f"sets an attribute {value!r}")
        done.append(each)


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    return (each for each in dis.get_instructions(code) if each.opname != "EXTENDED_ARG")


def _first(code: CodeType) -> str | None:
    """The name of its first argument, unless that is bound anew."""
    if not code.co_argcount:
        return None
    name = code.co_varnames[0]
    for each in dis.get_instructions(code):
        if "STORE_FAST" in each.opname and name in _names(each):
            return None
    return name


def _names(instruction: dis.Instruction) -> tuple[object, ...]:
    value = instruction.argval
    return value if isinstance(value, tuple) else (value,)


def _target(done: list[dis.Instruction], name: str) -> object:
    """The local variable whose attribute ``name`` is set after ``done``, if it is one's."""
    last = len(done) - 1
    if done[last].opname in _EXCHANGES:  # ``x.name += value``
        last -= 1
        while last > 1 and not (
            done[last].argval == name
            and done[last].opname == "LOAD_ATTR"
            and done[last - 1].opname in _COPIES
        ):
            last -= 1
        last -= 2
    loads = last >= 0 and "LOAD_FAST" in done[last].opname
    return _names(done[last])[-1] if loads else None
