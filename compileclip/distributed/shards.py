"""What a rank holds of a ``DTensor``.

Private parts of torch used here, read in torch 2.11 to 2.13: ``DTensor._local_tensor``, which
``to_local()`` returns too, at the cost of a call into autograd.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from compileclip.distributed.process_groups import ProcessGroups

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    # Importing DTensor takes longer than importing torch; who holds one has imported it.
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and bool(isinstance(tensor, module.DTensor))


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of ``tensors`` is a ``DTensor``."""
    if _PLAIN.issuperset(map(type, tensors)):
        return False
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(
        issubclass(kind, module.DTensor) for kind in set(map(type, tensors))
    )


def given_groups(process_group: Any) -> ProcessGroups | None:
    """What a user gave as ``process_group``, checked; see ``process_groups``."""
    if process_group is None:
        return None
    from compileclip.distributed.process_groups import process_groups  # it takes c10d

    return process_groups(process_group)


def local(tensor: Tensor) -> Tensor:
    """The part of a ``DTensor`` that this rank holds; any other tensor as it is.

    Of a part that a collective is still about to write, what holds it once it is there.
    """
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor._local_tensor
    if type(part) is not Tensor and hasattr(part, "wait"):  # AsyncCollectiveTensor
        part = part.wait()
    return part  # type: ignore[no-any-return]  # private, so Any


def as_placed(grad: Tensor, param: Tensor) -> Tensor:
    """``grad``, placed as its parameter: reduced where it is ``Partial``, which communicates.

    Args:
        grad: of ``param``.
        param: a ``DTensor``, or another tensor, for which nothing is done.

    Raises:
        ValueError: it cannot be placed so.
    """
    if not is_sharded(param) or not is_sharded(grad) or grad.placements == param.placements:
        return grad
    return _redistributed(grad, list(param.placements), f"as its parameter {param.placements}")


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, reduced where it is ``Partial``, which communicates.

    Raises:
        ValueError: it cannot be reduced.
    """
    if not is_sharded(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return _redistributed(tensor, placements, f"as {tuple(placements)}")


def _redistributed(grad: DTensor, placements: list[Any], how: str) -> Tensor:
    try:
        with torch.no_grad():
            placed: Tensor = grad.redistribute(grad.device_mesh, placements)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"a gradient of shape {tuple(grad.shape)} is placed {grad.placements}, and cannot be "
            f"placed {how}: {error}; redistribute it before the step. Nothing was changed"
        ) from error
    return placed
