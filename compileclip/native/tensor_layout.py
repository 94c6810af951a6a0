"""Where in memory torch's tensors keep what they are, found by looking at some that are known.

Read in torch 2.11 to 2.13: ``c10::TensorImpl`` has its storage, a number of dimensions, sizes and
strides within itself up to five of them, the offset of its first element, dtype and device in one
word, and the dispatch keys; ``c10::StorageImpl`` the address of its memory and what owns that.
Where another torch has them is looked up at run time; where that is not found, all is asked for
through torch's C interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

_INLINE = 5
_WORDS, _STORAGE_WORDS = 26, 6  # that are looked at
_MASK = (1 << 40) - 1  # two bytes of a dtype; a device's type, its index, and that there is one
NOTHING = (0,) * 8


class _WithOperations(Tensor):
    """Of a class that has its own."""

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> None:
        """Never called."""


def layout_of_tensors() -> tuple[int, ...]:
    """The fields of ``Torch``, in the native code, from ``shape`` on; zeros if not found."""
    whole = torch.empty(1000, device="cpu")
    tensor = whole.as_strided((3, 5, 7), (70, 11, 1), 37)
    storage = tensor.untyped_storage()
    words, held = _words(tensor), _at(storage._cdata, _STORAGE_WORDS)
    others = (
        torch._neg_view(tensor),
        Tensor._make_wrapper_subclass(_WithOperations, (1,), device=torch.device("cpu")),
    )
    keys = [torch._C._dispatch_keys(t).raw_repr() for t in (tensor, *others)]
    shapes = [i for i in range(_WORDS - 2 * _INLINE) if _is_shape(words[i:], tensor)]
    first, keyed = (_places(words, number) for number in (37, keys[0]))
    memory = _places(held, storage.data_ptr())
    if [*map(len, (shapes, first, _kinds(), keyed, memory))] != [1, 1, 1, 1, 2]:
        return NOTHING
    places = [8 * i for i in (*shapes, *first, *_kinds(), *keyed, *memory)]
    return (*places, _MASK, (keys[1] | keys[2]) & ~keys[0])


def tag_of_dicts() -> int:
    """Where CPython keeps a number that changes with each change of a dictionary; 0 if nowhere.

    ``ma_version_tag`` (PEP 509), which 3.14 no longer has.
    """
    tried: dict[str, int] = {"a": 0}
    seen = []

    def look() -> None:
        seen.append(_at(id(tried), 6))

    look()
    tried["a"] = 1
    look()
    tried.get("a")  # changes nothing
    same = _at(id(tried), 6) == seen[-1]
    tried.update(a=0)
    look()
    del tried["a"]
    look()
    tried["a"] = 0
    look()
    always = [i for i in range(2, 6) if len({words[i] for words in seen}) == len(seen)]
    return 8 * always[0] if same and len(always) == 1 else 0


def _at(address: int, count: int) -> list[int]:
    return [*(ctypes.c_uint64 * count).from_address(address)]


def _words(tensor: Tensor) -> list[int]:
    return _at(tensor._cdata, _WORDS)


def _places(words: Sequence[int], wanted: int) -> list[int]:
    return [i for i, word in enumerate(words) if word == wanted]


def _is_shape(words: Sequence[int], tensor: Tensor) -> bool:
    """Whether a number of dimensions, sizes and strides come first."""
    dim, strides = tensor.dim(), list(words[1 + _INLINE :])[: tensor.dim()]
    return list(words[: 1 + dim]) == [dim, *tensor.shape] and strides == list(tensor.stride())


def _kinds() -> list[int]:
    """The words of which the part that counts tells dtype and device, and nothing else."""
    shapes, dtypes = ((3, 5), (4,)), (torch.float32, torch.float64, torch.bfloat16)
    tensors = [[torch.empty(s, dtype=t, device="cpu") for s in shapes] for t in dtypes]
    tensors.append([torch.empty(s, device="meta") for s in shapes])
    alike = [[tuple(word & _MASK for word in _words(t)) for t in pair] for pair in tensors]
    found = []
    for i in range(_WORDS):
        kinds = [{words[i] for words in pair} for pair in alike]
        if all(len(kind) == 1 for kind in kinds) and len(set().union(*kinds)) == len(kinds):
            found.append(i)
    return found
