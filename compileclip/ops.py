"""The operators that graphs hold, registered with ``torch.library``.

``torch.ops.compileclip.total_norm(Tensor[] tensors, float norm_type) -> Tensor`` is one node in a
graph, however many tensors there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compileclip import reference

# Library.define costs a quarter of torch.library.custom_op per call on long lists of tensors.
_LIBRARY = torch.library.Library("compileclip", "FRAGMENT")
_LIBRARY.define(
    "total_norm(Tensor[] tensors, float norm_type) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("total_norm", reference.total_norm, "CompositeExplicitAutograd")


def _total_norm_fake(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    return torch.empty((), dtype=reference.norm_dtype(tensors), device=tensors[0].device)


torch.library.register_fake("compileclip::total_norm", _total_norm_fake, lib=_LIBRARY)


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """``reference.total_norm`` through the dispatcher, so that tracers see one operator."""
    result: Tensor = torch.ops.compileclip.total_norm(tensors, norm_type)
    return result
