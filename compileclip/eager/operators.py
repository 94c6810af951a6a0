"""The operators that graphs hold, registered with ``torch.library``.

``torch.ops.compileclip.total_norm(Tensor[] tensors, float norm_type) -> Tensor`` is one node in a
graph, however many tensors there are.

``torch.ops.compileclip.step_norm(Tensor max_norm, Tensor? total_norm, Tensor? grad_scale=None) ->
Tensor`` stands, in a step graph, for the total norm of all gradients that the step reads, until a
pass puts that norm (or the given one) in its place. ``grad_scale`` is a factor that the gradients
still have and the norm does not. Run as it is, it raises: no step may go on without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compileclip.eager import reference

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
_LIBRARY.define(
    "step_norm(Tensor max_norm, Tensor? total_norm, Tensor? grad_scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class NotRewrittenError(RuntimeError):
    """A captured step ran without the pass that inserts its norm and scale; nothing has changed."""


def _step_norm(
    max_norm: Tensor, total_norm: Tensor | None, grad_scale: Tensor | None = None
) -> Tensor:
    raise NotRewrittenError(
        "a captured step ran outside its compiled graph, where gradients would not be clipped"
    )


def _step_norm_fake(
    max_norm: Tensor, total_norm: Tensor | None, grad_scale: Tensor | None = None
) -> Tensor:
    # The dtype and the device are those of the norm that takes its place; nothing reads them here.
    return torch.empty_like(max_norm if total_norm is None else total_norm)


_LIBRARY.impl("step_norm", _step_norm, "CompositeExplicitAutograd")
torch.library.register_fake("compileclip::step_norm", _step_norm_fake, lib=_LIBRARY)


def total_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """``reference.total_norm`` through the dispatcher, so that tracers see one operator."""
    result: Tensor = torch.ops.compileclip.total_norm(tensors, norm_type)
    return result
