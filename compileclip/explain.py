"""The table that ``ClippedOptimizer.explain`` prints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.optim import Optimizer

from compileclip.eager import eager_step
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.modes import Modes
from compileclip.settings import ClipSettings

_HEADERS = ("group", "device", "dtype", "tensors", "elements", "mode", "update", "scale", "bytes")

# How often a gradient is read or written besides its read in the norm and its read in the update.
_EXTRA_GRADIENT_PASSES = {
    "none": 0,
    "inside the update": 0,
    "inside the update, written back": 1,
    "in the fused kernel, written back": 1,
    "in place": 2,
    "on copies, piece by piece": 4,
    "on copies, all at once": 4,
}


def explain(optimizer: Optimizer, settings: ClipSettings, modes: Modes) -> str:
    """Describe, bucket by bucket, what a step of ``optimizer`` under ``settings`` does.

    A bucket holds the parameters of one group that share device, dtype and mode.

    Args:
        optimizer: the wrapped optimizer.
        settings: how it clips.
        modes: what it steps with.

    Returns:
        A table. ``bytes`` counts what must be read and written per element: gradients for the
        norm, the scale and the update, parameters and state for the update. An update that is not
        fused moves more, for its intermediate results.
    """
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        buckets: defaultdict[tuple[torch.device, torch.dtype, str], list[Tensor]]
        buckets = defaultdict(list)
        for p in group["params"]:
            buckets[p.device, p.dtype, modes.taken(settings, p)].append(p)
        for (device, dtype, mode), params in buckets.items():
            compiled = mode != "eager"
            update = "compiled" if compiled else _update(group)
            scale = _scale(optimizer, settings, dtype, compiled)
            elements = sum(p.numel() for p in params)
            moved = _bytes_per_element(optimizer, params, scale)
            counted = f"{moved}" if update in ("fused", "compiled") else f">= {moved}"
            row = (index, device, dtype, len(params), elements, mode, update, scale, counted)
            rows.append(row)
    clip = (
        "measured, not clipped" if settings.max_norm is None else f"clipped to {settings.max_norm}"
    )
    lines = [
        f"{type(optimizer).__name__}: norm of order {settings.norm_type}, {clip}, "
        f"nonfinite={settings.nonfinite!r}, mode={settings.mode!r}",
        tabulate(rows, headers=_HEADERS),
        "bytes: read and written per element"
        + ("" if optimizer.state else "; the state is counted after the first step"),
    ]
    if modes.kernels is None and settings.mode in ("auto", "multi_tensor"):
        lines.append("before the first step: whether kernels can take it is known after that")
    plan = None if modes.over_ranks is None else modes.over_ranks.ranks.plan
    if plan is not None:
        lines += ["the norm of all ranks:", *(f"  {line}" for line in plan.described())]
    why = modes.why_eager(settings)
    if why is not None:
        lines.append(f"why eager: {why}")
    if settings.nonfinite == "raise":
        lines.append('nonfinite="raise": each step waits for the norm')
    elif settings.nonfinite == "skip" and modes.wait_for_the_norm:
        lines.append(
            'nonfinite="skip": each step waits for the norm; an optimizer made with fused=True '
            "(Adam, AdamW, SGD, Adagrad) decides it on the device, and so does on a GPU, in mode "
            "multi_tensor, one whose class knows capturable"
        )
    return "\n".join(lines)


def _update(group: dict[str, Any]) -> str:
    if group.get("fused"):
        return "fused"
    if group.get("foreach") or (group.get("foreach") is None and _on_gpu(group)):
        return "foreach"
    return "for-loop"


def _on_gpu(group: dict[str, Any]) -> bool:
    # torch.optim takes foreach by default where it has foreach kernels, unless told otherwise.
    return "foreach" in group and any(p.is_cuda for p in group["params"])


def _scale(optimizer: Optimizer, settings: ClipSettings, dtype: torch.dtype, compiled: bool) -> str:
    if settings.max_norm is None:
        return "none"
    if compiled:
        return "inside the update" + (", written back" if settings.write_grads else "")
    if settings.write_grads is False:
        pieces = is_torchs_own(optimizer)
        return "on copies, piece by piece" if pieces else "on copies, all at once"
    if eager_step.takes_grad_scale(optimizer) and dtype != torch.float64:
        return "in the fused kernel, written back"
    return "in place"


def _bytes_per_element(optimizer: Optimizer, params: list[Tensor], scale: str) -> int:
    size = params[0].element_size()
    gradient = (2 + _EXTRA_GRADIENT_PASSES[scale]) * size
    state = max((_state_bytes(p, optimizer.state.get(p, {})) for p in params), default=0)
    return gradient + 2 * size + 2 * state


def _state_bytes(param: Tensor, state: dict[str, Any]) -> int:
    """Bytes of state per element of ``param``, counting what has its shape."""
    return sum(
        v.element_size()
        for v in list(state.values())  # a step in another thread may make more
        if isinstance(v, Tensor) and v.shape == param.shape and v.dim() > 0
    )
