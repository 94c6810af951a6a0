"""Why a step of mode ``multi_tensor`` is not to be had, as far as that is known before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import kept
from compileclip.lowering import UnsupportedError
from compileclip.lowering.native import CompilerError
from compileclip.plan import Plan
from compileclip.settings import ClipSettings
from compileclip.shadow import NotPointwiseError
from compileclip.sorting import overlap
from compileclip.work import Work

# Why a step is not served, as it is prepared.
REASONS = (NotPointwiseError, UnsupportedError, CompilerError)
# Of another class than torch's, each bucket's step looks at each group.
MOST_LOOKS = 1024


def why_not_planned(
    optimizer: Optimizer, settings: ClipSettings, params: Sequence[Tensor]
) -> str | None:
    """Why ``params``, which have gradients, are not to be sorted into buckets."""
    devices = {p.device for p in params}
    if len(devices) > 1:
        return "parameters lie on several devices"
    device = devices.pop()
    if device.type != "cpu" and (settings.mode == "auto" or device.type != "cuda"):
        return "parameters lie on another device than the CPU"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, before any step that was not"
    if torch.is_inference_mode_enabled():
        return "torch.inference_mode() is on, in which new state would stay unusable elsewhere"
    if settings.write_grads and overlap(p.grad for p in params if p.grad is not None):
        return "two gradients share memory, which is to be written"
    return kept.why_not(optimizer)


def why_not_captured(
    settings: ClipSettings, plan: Plan | None, works: Sequence[Work], bound: float | None
) -> str | None:
    """Why a step cannot become part of a CUDA graph.

    Args:
        settings: of the step.
        plan: of the step before, or None.
        works: its buckets.
        bound: the ``max_norm`` that kernels find on the device.
    """
    if plan is None:
        return "a CUDA graph is being captured, before any step that was not"
    if settings.nonfinite == "raise":
        return 'a CUDA graph is being captured, in which nonfinite="raise" cannot be'
    if plan.refused:
        return "a CUDA graph is being captured, and not all parameters are served"
    if settings.max_norm not in (None, bound):
        return "a CUDA graph is being captured, in which max_norm cannot be set"
    if not all(work.decides for work in works):
        return "a CUDA graph is being captured, which would repeat this step's count"
    return None
