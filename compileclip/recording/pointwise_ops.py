"""Which of ATen's operations are pointwise, and what they are where nothing is written in place."""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from compileclip.recording.shadow import NotPointwiseError

ATEN = torch.ops.aten
# Not tagged as pointwise, but each element of the result depends on the same element alone.
_UNTAGGED = {
    ATEN.clone.default,
    ATEN.copy_.default,
    ATEN.detach.default,
    ATEN.alias.default,
    ATEN._to_copy.default,
    ATEN.lift_fresh.default,
    ATEN.index_put_.default,  # by a mask
    ATEN.fill_.Scalar,
    ATEN.fill_.Tensor,
    ATEN.zero_.default,
    *(getattr(ATEN, f"{name}_like").default for name in ("zeros", "ones", "full", "empty")),
}


def is_pointwise(func: OpOverload) -> bool:
    """Whether each element of the result depends on the same element of the arguments alone.

    Raises:
        NotPointwiseError: ``func`` has no functional form.
    """
    return func in _UNTAGGED or torch.Tag.pointwise in functional(func).tags


def functional(func: OpOverload) -> OpOverload:
    """The overload that returns what ``func`` writes: of add_.Tensor, add.Tensor."""
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    if not func._schema.is_mutable:
        return func
    packet = getattr(ATEN, name.removesuffix("_"), None)
    for candidate in (overload, "default", "Tensor", "Tensor_Scalar"):
        found = getattr(packet, candidate, None)
        if found is not None and not found._schema.is_mutable and _kinds(found) == _kinds(func):
            return found  # type: ignore[no-any-return]  # getattr's is Any
    raise NotPointwiseError(f"{func} has no functional form")


def _kinds(func: OpOverload) -> list[str]:
    """The types of the arguments but for a tensor that the result is written to."""
    return [str(a.type) for a in func._schema.arguments if not a.is_out]
