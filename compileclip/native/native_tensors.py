"""Torch's tensors as native code sees them: their addresses, gradients and layouts.

Python takes a microsecond and more per parameter to ask for its gradient, for four addresses and
whether anything is another than before; this takes a tenth. It knows of torch:

* that the Python object of a tensor holds an ``at::Tensor``, which is one pointer, to what
  ``_cdata`` says. Where in the object is looked up at run time;
* where a tensor keeps the number that ``_version`` tells, its storage, shape, dtype and device, and
  a storage its memory. That is looked up at run time too, and done without where it is not found;
* the C interface of libtorch (``torch/csrc/inductor/aoti_torch/c/shim.h``), which is kept stable,
  and ``c10::TensorImpl::grad()``. Read in torch 2.11 to 2.13.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from compileclip.fallback import UnsupportedError
from compileclip.native import (
    cuda_driver_source,
    native_build,
    native_foreach_source,
    native_step_source,
    native_tensors_source,
    optimizer_unchanged_source,
)
from compileclip.native.tensor_layout import layout_of_tensors, tag_of_dicts

SOURCE = "".join(
    module.SOURCE
    for module in (
        *(native_tensors_source, optimizer_unchanged_source),
        *(cuda_driver_source, native_step_source, native_foreach_source),
    )
)

_SHIM = ("data_ptr", "dim", "sizes", "strides", "dtype", "layout", "device_type", "device_index")
_HOLDERS = "new_tensor_handle", "delete_tensor_object"
_PYTHON = ("Dict_GetItemWithError", "List_GetItem", "List_Size", "Dict_Next")
_GRAD = "_ZNK3c1010TensorImpl4gradEv"  # at::Tensor const& c10::TensorImpl::grad() const


class Library:
    """The native functions, and what they know of torch.

    Raises:
        UnsupportedError: this version of torch is another than they are made for.
    """

    def __init__(self) -> None:
        library, pointer = native_build.load(SOURCE), ctypes.c_void_p
        status, held = ctypes.c_int, ctypes.PYFUNCTYPE  # which keeps Python from other threads
        self.gather = held(status, pointer, pointer, status)(("compileclip_gather", library))
        self.note_written = held(status, pointer, pointer, status)(
            ("compileclip_note_written", library)
        )
        fetch = held(None, pointer, pointer, ctypes.c_int64)
        self.fetch = fetch(("compileclip_fetch", library))
        same = held(status, pointer, pointer, ctypes.py_object, ctypes.py_object)
        self.same = same(("compileclip_same", library))
        copy = (status, pointer, ctypes.c_uint64, pointer, ctypes.c_int64, pointer)
        self.copy = held(*copy)(("compileclip_copy", library))
        self.copy_captured = held(*copy, pointer)(("compileclip_copy_captured", library))
        give_back = held(None, pointer, ctypes.c_int64, pointer)
        self.give_back = give_back(("compileclip_give_back", library))
        step = held(status, pointer, pointer, *[ctypes.py_object] * 5, pointer, status)
        self.step = step(("compileclip_step", library))
        integer, object_ = ctypes.c_int64, ctypes.py_object
        gather = held(status, pointer, pointer, object_, integer)
        self.gather_list = gather(("compileclip_list", library))
        contiguous = held(status, pointer, pointer, object_, integer, object_)
        self.contiguous = contiguous(("compileclip_contiguous", library))
        where = (object_, integer, ctypes.c_uint64, ctypes.c_uint64, pointer, ctypes.c_double)
        launch = held(status, pointer, pointer, *where, pointer)
        self.launch_list = launch(("compileclip_launch_list", library))
        folder = Path(torch.__file__).parent / "lib"
        try:
            shim, c10 = (ctypes.CDLL(str(folder / f"lib{k}.so")) for k in ("torch_cpu", "c10"))
            functions = [getattr(shim, f"aoti_torch_get_{name}") for name in _SHIM]
            functions.append(getattr(c10, _GRAD))
            self.holders = [_entry(getattr(shim, f"aoti_torch_{name}")) for name in _HOLDERS]
        except (OSError, AttributeError) as error:
            raise UnsupportedError(f"torch {torch.__version__}: {error}") from error
        functions += [getattr(ctypes.pythonapi, f"Py{name}") for name in _PYTHON]
        self._shim = dict(zip((*_SHIM, "grad"), functions, strict=False))
        self._addresses = [_entry(f) for f in functions]
        offset = _offset()
        grad = ctypes.CFUNCTYPE(pointer, pointer)(_entry(getattr(c10, _GRAD)))
        bare = torch.empty(0, device="cpu")
        undefined = ctypes.c_int64.from_address(grad(bare._cdata) or 0).value
        self._offset, self._storage_offset = offset, _offset_of_storage(bare)
        self._grad = grad
        version = _offsets_of_version()
        self.knows_versions = version != (0, 0)
        offsets = offset, self._storage_offset, *version
        self._layout = layout_of_tensors()
        self._held = array(
            "q", [*self._addresses, undefined, *offsets, *self._layout, tag_of_dicts()]
        )
        self.torch = address(self._held)

    def storage_of(self, implementation: int) -> int:
        """Where the storage of a tensor lies, of which ``_cdata`` is given; it may be a guess."""
        found: int = ctypes.c_int64.from_address(implementation + self._storage_offset).value
        return found

    def end_of(self, implementation: int) -> int:
        """Where a tensor, of which ``_cdata`` is given, keeps its dtype; it may be a guess."""
        return implementation + self._layout[2]

    def grad_of(self, implementation: int) -> int:
        """Where a tensor, of which ``_cdata`` is given, keeps its gradient."""
        return self._grad(implementation) or 0

    def plain(self, tensor: Tensor) -> tuple[int, int, int]:
        """``Plain`` of tensors like ``tensor``."""
        if not self._layout[0]:
            return 0, 0, 0
        _, _, kind, keys, *_, mask, _ = self._layout
        words = [ctypes.c_int64.from_address(tensor._cdata + at).value for at in (kind, keys)]
        return words[0] & mask, words[1], tensor.element_size()

    def kind(self, tensor: Tensor) -> list[int]:
        """dtype, layout, device type and device index, as torch numbers them."""
        handle = ctypes.c_void_p(id(tensor) + self._offset)
        found = []
        for name in ("dtype", "layout", "device_type", "device_index"):
            number = ctypes.c_int32()
            if self._shim[name](handle, ctypes.byref(number)):
                raise UnsupportedError(f"torch {torch.__version__} does not tell a {name}")
            found.append(number.value)
        return found


def _offset_of_storage(tensor: Tensor) -> int:
    """Where in what a tensor holds its storage is."""
    words = (ctypes.c_int64 * 8).from_address(tensor._cdata)
    storage = tensor.untyped_storage()._cdata
    return 8 * list(words).index(storage) if storage in words else 0


def _offsets_of_version() -> tuple[int, int]:
    """Where in what a tensor holds its version counter is, and the number in that; or zeros."""
    tensor = torch.empty(0, device="cpu")
    alike, other = tensor.detach(), tensor.data  # the first shares the counter, the second does not
    words = [list((ctypes.c_int64 * 8).from_address(t._cdata)) for t in (tensor, alike, other)]
    found = [i for i, (a, b, c) in enumerate(zip(*words, strict=True)) if a and a == b != c]
    if len(found) != 1:
        return 0, 0
    numbers = (ctypes.c_uint32 * 5).from_address(words[0][found[0]])
    before = list(numbers)
    increment_version([tensor] * 3)
    moved = [(i, b - a) for i, (a, b) in enumerate(zip(before, numbers, strict=True)) if a != b]
    return (8 * found[0], 4 * moved[0][0]) if [by for _, by in moved] == [3] else (0, 0)


def _entry(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _offset() -> int:
    """Where in its Python object a tensor is."""
    tensors = [torch.empty(0, device="cpu"), torch.nn.Parameter(torch.empty(0, device="cpu"))]
    for offset in range(8, Tensor.__basicsize__, 8):
        found = [ctypes.c_int64.from_address(id(t) + offset).value for t in tensors]
        if found == [t._cdata for t in tensors]:
            return offset
    raise UnsupportedError(f"torch {torch.__version__} keeps tensors elsewhere")


@functools.cache
def library() -> Library:
    """The native functions, compiled at the first call."""
    return Library()


@functools.cache
def has_library() -> bool:
    """Whether ``library`` can be compiled."""
    try:
        library()
    except native_build.CompilerError:
        return False
    return True


def address(numbers: array[Any]) -> int:
    """That of an array's numbers."""
    return numbers.buffer_info()[0]
