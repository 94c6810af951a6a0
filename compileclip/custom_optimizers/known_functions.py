"""What a step may read and call without a trace: constants, operations of torch, and built-ins.

Private to torch and used here, read in torch 2.11 to 2.14: where its operations are.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from enum import Enum
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

# Modules of torch whose Python functions do nothing but operations, and ask optimizers for methods.
_OPERATIONS = ("torch.functional", "torch._tensor", "torch.nn.functional")
# Of built-in functions, those that are written in C.
_BUILTIN = """
    abs all any ascii bin callable chr divmod format getattr hasattr hash hex id isinstance
    issubclass iter len max min next oct ord pow repr round sorted sum
"""
_COMPUTING = frozenset(_BUILTIN.split())
_MODULES = """
    math cmath _operator itertools torch._C._linalg torch._C._nn torch._C._special torch._C._fft
"""
_COMPUTING_MODULES = frozenset(_MODULES.split())
# Modules whose classes only hold what they are given.
HOLDING = ("builtins", "collections", "collections.abc", "itertools", "math", "typing", "numbers")
_ASKING = """
    is_grad_enabled is_inference_mode_enabled get_default_dtype is_tensor compiler.is_compiling
    jit.is_scripting distributed.is_available distributed.is_initialized
    _C._group_tensors_by_device_and_dtype
"""
_CLASSES = (
    *(torch.Size, torch.device, torch.dtype, torch.finfo, torch.iinfo),
    *(torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode),
)
# What a tensor's method does that is no operation, and would be done to a stand-in alone.
_METHODS = """
    backward register_hook register_post_accumulate_grad_hook retain_grad requires_grad_
    share_memory_
"""
TO_TENSORS = frozenset(_METHODS.split())
# Special names that say something of an object, and give away nothing that can be changed.
_SAYING = ("__class__", "__name__", "__qualname__", "__doc__", "__init__", "__len__")
MISSING = object()


def computes(function: Any) -> bool:
    """Whether a function only computes, or asks how things are."""
    if function in _torch_functions():
        return True
    owner = getattr(getattr(function, "__self__", None), "__name__", None)
    named = owner == "builtins" and function.__name__ in _COMPUTING
    return named or owner in _COMPUTING_MODULES


def operates(function: types.FunctionType) -> bool:
    """Whether it is torch's own and does nothing but operations, and optimizers' methods."""
    module = str(function.__module__)
    return module in _OPERATIONS or module.startswith("torch.optim.")


@cache
def _torch_functions() -> frozenset[Any]:
    asking = [reduce(_attribute, name.split("."), torch) for name in _ASKING.split()]
    found: Any = torch._C._VariableFunctions
    names = (n for n in dir(found) if not n.startswith("__") and n != "from_file")
    return frozenset((*asking, *(getattr(found, name) for name in names)))


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)  # a build without "distributed" has not all


def is_harmless_class(cls: type) -> bool:
    """Whether to make an object of it, and to call its methods, changes nothing else."""
    known = cls.__module__ in HOLDING or cls.__module__.startswith("torch.optim.")
    tensors = issubclass(cls, Tensor) and cls.__module__.partition(".")[0] == "torch"
    return known or tensors or cls in _CLASSES or issubclass(cls, (Enum, *_numpy_numbers()))


def is_constant(value: Any) -> bool:
    """Whether it can neither change nor do anything but compute."""
    return isinstance(value, (*_CONSTANTS, *_numpy_numbers())) or (
        value is NotImplemented or type(value).__module__ == "typing"
    )


_CONSTANTS = (
    *(int, float, complex, str, bytes, types.NoneType, types.EllipsisType, Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload, OpOverloadPacket),
    *(types.GenericAlias, types.UnionType),
    # A built-in class's own methods.
    *(types.MethodDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType),
    *(types.ClassMethodDescriptorType, types.MemberDescriptorType),
)


@cache
def _numpy_numbers() -> tuple[type, ...]:
    try:
        import numpy as np
    except ImportError:
        return ()
    return (np.generic, np.ufunc)


_NAMESPACE = type(torch.ops.aten)
HOLDERS = (types.ModuleType, types.FunctionType, type, _NAMESPACE)


def taken(value: Any, attribute: str) -> Any:
    """An attribute of one of ``HOLDERS``, looked up without running anything; or ``MISSING``."""
    if value is torch.ops:
        return getattr(value, attribute) if attribute in ("aten", "prims") else MISSING
    if isinstance(value, _NAMESPACE):
        return getattr(value, attribute, MISSING)
    if isinstance(value, types.ModuleType):
        return vars(value).get(attribute, MISSING)
    if isinstance(value, type) and issubclass(value, Enum):
        return getattr(value, attribute, MISSING)
    if attribute.startswith("__") and attribute not in _SAYING:
        return MISSING
    return inspect.getattr_static(value, attribute, MISSING)


def members(value: Any) -> Iterator[Any]:
    """What a list, dictionary, set or tuple holds, and what these hold; or the value itself."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from members(each)
    else:
        yield value
