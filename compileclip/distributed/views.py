"""What stands for the part of a ``DTensor`` in a step, and back to the ``DTensor``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compileclip.distributed.shards import is_sharded

# An attribute of a view: the shape of the whole parameter, for who asks for more than numbers.
WHOLE_SHAPE = "_compileclip_whole_shape"


def has_view(param: Tensor) -> bool:
    """Whether ``param`` is a ``DTensor`` of whose parts kernels can take more than one at a time.

    What is no plain tensor has no memory to look at; in state of a 0-dim one, parts and counts look
    alike.
    """
    return is_sharded(param) and param.dim() > 0 and type(param._local_tensor) is Tensor


def same_memory(part: Tensor, view: Tensor) -> bool:
    """Whether ``view`` has the memory of ``part``."""
    return part.data_ptr() == view.data_ptr()


def mark(view: Tensor, param: Tensor) -> None:
    """Give ``view`` what a step may ask of ``param`` besides its numbers."""
    marks = vars(view)
    marks.clear()
    marks.update(vars(param))
    marks[WHOLE_SHAPE] = tuple(param.shape)
    view.requires_grad_(param.requires_grad)


def placed_alike(value: Tensor, param: Tensor) -> bool:
    """Whether state is distributed as its parameter."""
    assert is_sharded(value)
    assert is_sharded(param)
    same = value.device_mesh == param.device_mesh and value.placements == param.placements
    return same and value.shape == param.shape


def whole_of(value: Any, view: Tensor, param: Tensor) -> Any:
    """What the optimizer keeps of what a step has made for ``view``."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape != view.shape:
        return value
    if is_sharded(value):
        return value
    assert is_sharded(param)
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            value,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
