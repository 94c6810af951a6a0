"""What the step of another class than torch's reaches outside of itself, as its code tells.

Whoever wraps an optimizer does not ask for its step to be tried: a trial on stand-ins must leave
no trace, and so must steps that are learned in a parameter's place. What a step does to itself,
to state and groups is seen there (``shadow.py``); but a number counted up in a module, a line that
was printed or a file that was written could not be taken back. So before anything is tried, the
step's code is read, and that of whatever it may call: all that it finds outside must be a number,
an operation of torch, or a function that is read in turn. What is not known is not tried.

Private to torch and used here, read in torch 2.11 to 2.14: the name of the function that
``torch.compile`` puts around another, and of its file.
"""

from __future__ import annotations

import builtins
import os
import types
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from compileclip.custom_optimizers.code_accesses import accesses_of
from compileclip.custom_optimizers.known_functions import (
    HOLDERS,
    HOLDING,
    MISSING,
    TO_TENSORS,
    computes,
    is_constant,
    is_harmless_class,
    members,
    operates,
    taken,
)
from compileclip.distributed.views import WHOLE_SHAPE
from compileclip.eager.optimizer_state import raw_step
from compileclip.recording import optimizer_attributes
from compileclip.recording.shadow import NotPointwiseError

_TORCH = os.path.dirname(torch.__file__) + os.sep
_COMPILED, _COMPILING = "compile_wrapper", os.path.join("torch", "_dynamo", "eval_frame.py")
# What is not called of an object that is there, and steps.
_OTHERS = """
    __init__ __new__ __init_subclass__ __class_getitem__ __repr__ __reduce__ __reduce_ex__
    __getstate__ __setstate__ __subclasshook__
"""
_UNCALLED = frozenset(_OTHERS.split())
_ORDINARY = ("param_groups", "state", "defaults")
_OF_CLASSES = ("__new__", "__init_subclass__", "__class_getitem__")  # without a decorator
# Of a class, what says nothing of what it does.
_DESCRIBING = ("__dict__", "__weakref__", "__annotations__", "__static_attributes__")
# Names by which a step asks whether a parameter is sharded, which a part cannot answer.
_OF_SHARDS = {"DTensor", "device_mesh", "placements", "to_local", "full_tensor", "_local_tensor"}


def check(optimizer: Optimizer) -> None:
    """See that a trial of the step would leave no trace.

    Raises:
        NotPointwiseError: it could.
    """
    _Reach(optimizer).look()


class _Reach:
    """What a step has been seen to reach so far."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        mro = type(optimizer).__mro__
        self._classes = [cls for cls in mro[: mro.index(Optimizer)] if cls is not object]
        params = (p for group in optimizer.param_groups for p in group["params"])
        self._steps_parts = any(WHOLE_SHAPE in vars(p) for p in params)
        self._seen: set[Any] = set()
        self._names: set[str] = set()
        self._where = "the step"  # the function that is being read

    def look(self) -> None:
        """Read all that the step may call.

        Raises:
            NotPointwiseError: something of it could leave a trace.
        """
        self._value(raw_step(self._optimizer), "step", of_class=True)
        for cls in self._classes:
            for name, value in vars(cls).items():
                function = getattr(value, "__func__", value)
                if name.startswith("__") and isinstance(function, types.FunctionType):
                    self._attribute(name)  # Python calls it
        for name, value in self._kept():
            for each in members(value):
                if optimizer_attributes.is_fixed(each):  # the rest is refused elsewhere, or copied
                    self._value(each, name)
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                for name in self._names & vars(p).keys():
                    if not optimizer_attributes.is_fixed(vars(p)[name]):
                        self._refuse(f"may change a parameter's {name!r}")

    def _kept(self) -> list[tuple[str, Any]]:
        """What the optimizer keeps, by name."""
        skipped = {*optimizer_attributes.usual(), "step", "params"}
        held = (vars(self._optimizer), self._optimizer.defaults, *self._optimizer.param_groups)
        return [(k, v) for values in held for k, v in values.items() if k not in skipped]

    def _refuse(self, what: str) -> None:
        raise NotPointwiseError(f"a trial could leave a trace: {self._where} {what}")

    def _value(self, value: Any, name: str, of_class: bool = False) -> None:
        """Look at what is found under ``name``, in a class if ``of_class``."""
        if isinstance(value, staticmethod | classmethod):
            value, of_class = value.__func__, False
        if is_constant(value):
            return
        if isinstance(value, types.FunctionType):
            self._function(value, name, of_class and name not in _OF_CLASSES)
        elif isinstance(value, property):
            for each in (value.fget, value.fset, value.fdel):
                self._value(each, name, of_class)
        elif isinstance(value, tuple | frozenset):
            for each in value:
                self._value(each, name)
        elif isinstance(value, type):
            self._class(value, name)
        elif not isinstance(value, types.BuiltinFunctionType):
            does = "calls" if callable(value) else f"may change the {type(value).__name__}"
            self._refuse(f"{does} {name!r}")
        elif not computes(value):
            self._refuse(f"calls {name!r}")

    def _function(self, function: types.FunctionType, name: str, is_method: bool) -> None:
        code = function.__code__
        is_made = code.co_name == _COMPILED and code.co_filename.endswith(_COMPILING)
        if is_made or function is torch.compile:
            what = "what torch.compile made" if is_made else "torch.compile"
            raise NotPointwiseError(f"the step compiles by itself: it calls {what}")
        if computes(function) or (function, is_method) in self._seen:
            return
        self._seen.add((function, is_method))
        # What torch puts around a function: no_grad, hooks, what keeps Dynamo out.
        inner = getattr(function, "__wrapped__", None)
        if code.co_filename.startswith(_TORCH) and inner is not None:
            self._value(inner, name, is_method)
        elif operates(function):
            for each in accesses_of(code).names:
                self._attribute(each)
        else:
            before, self._where = self._where, function.__qualname__.replace(".<locals>", "")
            try:
                self._outside(function, is_method)
            except NotPointwiseError:
                if _is_torchs(code):  # what is within it tells nobody anything
                    self._where = before
                    self._refuse(f"calls {name!r}")
                raise
            self._where = before

    def _outside(self, function: types.FunctionType, is_method: bool) -> None:
        """Look at what the code of ``function`` accesses."""
        code = function.__code__
        found = accesses_of(code)
        self._check_shards(*found.names, *found.texts, *chain.from_iterable(found.globals))
        for what in found.writes:
            self._refuse(what)
        if found.own and not is_method:  # what is set of an optimizer is seen in a trial
            self._refuse(f"sets an attribute {found.own[0]!r}")
        for key, value in vars(function).items():
            self._value(value, f"{function.__name__}.{key}")
        for name in found.rebound & set(code.co_freevars):
            self._refuse(f"sets {name!r}, which is not its own")
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(value, "a default value")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and _is_filled(cell):
                self._value(cell.cell_contents, name)
        for names in found.globals:
            self._global(function, names)
        asked = set(found.names)
        if ("getattr",) in found.globals:  # of any name
            asked |= found.texts.union(*map(vars, self._classes)) - _UNCALLED
        for name in sorted(asked):
            self._asked(name)
            self._attribute(name)

    def _asked(self, name: str) -> None:
        """Refuse what an attribute of that name does, whosever it is."""
        self._names.add(name)
        if name in TO_TENSORS:
            self._refuse(f"calls {name!r}")
        method = isinstance(vars(Optimizer).get(name), types.FunctionType)
        harmless = name == "step" or name.startswith(("__", "_cuda_graph"))
        usual = name in optimizer_attributes.usual() and name not in _ORDINARY
        shared = name == "defaults" and not optimizer_attributes.is_data(self._optimizer.defaults)
        if (method and not harmless) or usual or shared:
            self._refuse(f"may change the optimizer by {name!r}")

    def _check_shards(self, *names: str) -> None:
        asked = _OF_SHARDS.intersection(names) if self._steps_parts else ()
        for name in asked:
            raise NotPointwiseError(f"{self._where} asks for {name!r}, as if parameters were whole")

    def _attribute(self, name: str) -> None:
        """Look at what ``name`` is where it is taken of the optimizer."""
        for cls in self._classes:
            if name in vars(cls) and name not in _UNCALLED:
                if isinstance(vars(cls)[name], types.MemberDescriptorType):
                    self._refuse(f"may change {name!r}, which the optimizer keeps in a slot")
                self._value(vars(cls)[name], name, of_class=True)

    def _global(self, function: types.FunctionType, names: tuple[str, ...]) -> None:
        """Look at a global of ``function`` and the attributes that are taken of it in turn."""
        name, *attributes = names
        value = function.__globals__.get(name, getattr(builtins, name, MISSING))
        if value is MISSING:
            return  # a NameError, or of a class that is being defined
        for i, attribute in enumerate(attributes):
            if not isinstance(value, HOLDERS):
                for each in attributes[i:]:
                    self._asked(each)
                    self._attribute(each)
                break
            if isinstance(value, type):
                self._asked(attribute)
            name, value = f"{name}.{attribute}", taken(value, attribute)
        if value is MISSING or isinstance(value, types.ModuleType):
            self._refuse(f"asks for {name!r}, of which nothing is known")
        self._value(value, name)

    def _class(self, cls: type, name: str) -> None:
        """Look at a class, which may be called."""
        if is_harmless_class(cls) or cls in self._classes or cls in self._seen:
            return
        self._seen.add(cls)
        if cls.__module__.partition(".")[0] == "torch":
            self._refuse(f"calls {name!r}")
        for each in (c for c in cls.__mro__ if c.__module__ not in HOLDING):
            for key, value in vars(each).items():
                if key not in _DESCRIBING:
                    self._value(value, key, of_class=True)


def _is_torchs(code: types.CodeType) -> bool:
    """Whether it is of torch, but of no optimizer."""
    optim = os.path.join(_TORCH, "optim", "")
    return code.co_filename.startswith(_TORCH) and not code.co_filename.startswith(optim)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not MISSING
    except ValueError:
        return False
