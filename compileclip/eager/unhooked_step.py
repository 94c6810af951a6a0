"""An optimizer's own step without its hooks, on its gradients or on scaled copies of them.

Private parts of torch used here, read in torch 2.11 to 2.13: ``Optimizer.step``'s ``hooked`` and
``__wrapped__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.distributed.shards import local
from compileclip.eager import reference

# write_grads=False copies this much of the gradients at a time, or one gradient if that is larger.
COPY_BYTES = 64 << 20


# Of torch.optim, but for Adafactor, LBFGS, Muon and SparseAdam.
_ELEMENTWISE = {
    *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
}


def is_torchs_own(optimizer: Optimizer) -> bool:
    """Whether the step is torch's, and so known to treat each parameter by itself."""
    for name in ("step", "_init_group"):
        function = getattr(type(optimizer), name, None)
        module = str(getattr(function, "__module__", None))
        if function is not None and not module.startswith("torch.optim."):
            return False
    return True


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the step is known to treat each element by itself, so that a part can be stepped."""
    return is_torchs_own(optimizer) and type(optimizer).__name__ in _ELEMENTWISE


def unhooked_step(optimizer: Optimizer) -> Callable[[], object]:
    """The optimizer's step without its hooks, which the wrapper has run already."""
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]  # functools.wraps sets it
    return lambda: step(optimizer)


def _scaled_copies(grads: Sequence[Tensor], factor: Tensor | None) -> list[Tensor]:
    copies = [g.clone() for g in grads]
    if factor is not None:
        reference.scale_([local(g) for g in copies], factor)
    return copies


def step_on_copies(optimizer: Optimizer, params: list[Tensor], factor: Tensor | None) -> None:
    """Step on scaled copies of the gradients, and put the gradients back as they were.

    An optimizer skips parameters whose gradient is None, so torch's own run on some parameters at
    a time. Another one may do once a step what this would repeat (count the step in its group, take
    a statistic over all gradients), so it gets all copies at once.
    """
    grads = [p.grad for p in params if p.grad is not None]
    pairs = list(zip(params, grads, strict=True))
    step = unhooked_step(optimizer)
    try:
        for p in params:
            p.grad = None
        for piece in _pieces(pairs) if is_torchs_own(optimizer) else [pairs]:
            _set_grads(piece, _scaled_copies([g for _, g in piece], factor))
            step()
            _set_grads(piece, [None] * len(piece))
    finally:
        _set_grads(pairs, grads)


def _set_grads(pairs: Sequence[tuple[Tensor, Tensor]], grads: Sequence[Tensor | None]) -> None:
    for (p, _), grad in zip(pairs, grads, strict=True):
        p.grad = grad


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Split ``pairs`` so that the gradients of each piece fill ``COPY_BYTES`` at most."""
    piece, size = list[tuple[Tensor, Tensor]](), 0
    for p, grad in pairs:
        nbytes = (grad._values() if grad.layout == torch.sparse_coo else local(grad)).nbytes
        if piece and size + nbytes > COPY_BYTES:
            yield piece
            piece, size = [], 0
        piece.append((p, grad))
        size += nbytes
    if piece:
        yield piece
