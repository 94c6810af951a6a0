"""Why a step of mode ``multi_tensor`` is not to be had, as far as that is known before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip import passes
from compileclip.buckets.bucket_step import BucketStep
from compileclip.buckets.grouping import overlap
from compileclip.buckets.step_plan import Plan
from compileclip.eager.eager_step import Scaler, takes_grad_scale
from compileclip.fallback import CannotCompileError, UnsupportedError
from compileclip.lowering import why_no_kernels
from compileclip.native.native_build import CompilerError
from compileclip.recording import optimizer_attributes
from compileclip.recording.shadow import NotPointwiseError, failed
from compileclip.settings import ClipSettings

# Why a step is not served, as it is prepared.
REASONS = (NotPointwiseError, UnsupportedError, CompilerError)
OTHER_MODES = (
    'take mode="auto", which does the same without a warning, mode="inductor", which compiles '
    'whatever torch.compile can trace, or mode="eager"'
)
# Of another class than torch's, each bucket's step looks at each group.
MOST_LOOKS = 1024


def why_not_planned(
    optimizer: Optimizer, settings: ClipSettings, params: Sequence[Tensor]
) -> str | None:
    """Why ``params``, which have gradients, are not to be sorted into buckets.

    Raises:
        ValueError: ``COMPILECLIP_DISABLE_PASSES`` names no pass.
    """
    left_out: str | None = passes.why_not_inserted()
    if left_out is not None:
        return left_out
    devices = dict.fromkeys(p.device for p in params)
    reasons = filter(None, map(why_no_kernels, devices))
    for reason in reasons:
        return reason
    capturing = "cuda" in {d.type for d in devices} and torch.cuda.is_current_stream_capturing()
    if capturing:
        return "a CUDA graph is being captured, before any step that was not"
    if torch.is_inference_mode_enabled():
        return "torch.inference_mode() is on, in which new state would stay unusable elsewhere"
    if settings.write_grads and overlap(p.grad for p in params if p.grad is not None):
        return "two gradients share memory, which is to be written"
    return optimizer_attributes.why_not(optimizer)


def why_not_captured(
    settings: ClipSettings, plan: Plan | None, works: Sequence[BucketStep], bound: float | None
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
    if len({work.place for work in works}) > 1:
        return "a CUDA graph is being captured, and parameters lie on several devices"
    if plan.refused:
        return "a CUDA graph is being captured, and not all parameters are served"
    if settings.max_norm not in (None, bound):
        return "a CUDA graph is being captured, in which max_norm cannot be set"
    if not all(work.decides for work in works):
        return "a CUDA graph is being captured, which would repeat this step's count"
    return None


def why_not_decided(optimizer: Optimizer, plan: Plan) -> str | None:
    """Why the device could not decide whether a step of ``plan`` counts, though it could without.

    torch's fused kernels decide that for all parameters, ours for those alone that they serve.
    """
    if not takes_grad_scale(optimizer):
        return None
    what = "the device is to decide whether a step counts, as torch's fused kernels do, and"
    if any(table.bucket.counts and not table.bucket.stays for table in plan.tables):
        return f"{what} {type(optimizer).__name__} counts its steps on the host here"
    if plan.refused:
        return f"{what} not all parameters are served: {of_some(plan.refused)}"
    return None


def of_some(refused: Sequence[tuple[Tensor, str]]) -> str:
    """How many parameters are not served, and why the first is not; nothing where all are."""
    if not refused:
        return ""
    count, (param, reason) = len(refused), refused[0]
    return (
        f"{count} parameter{'s' if count > 1 else ''}, one of shape {tuple(param.shape)}: {reason}"
    )


def check_plan(optimizer: Optimizer, plan: Plan, decides: bool, is_foreign: bool) -> None:
    """See that steps of ``plan`` can be served.

    Args:
        optimizer: whose.
        plan: just made.
        decides: whether a device is to decide that a step does not count.
        is_foreign: whether the optimizer's class is another than torch's.

    Raises:
        UnsupportedError: they cannot.
    """
    groups = len(optimizer.param_groups)
    if is_foreign and len(plan.tables) * groups > MOST_LOOKS:
        raise UnsupportedError(f"there are {groups} groups")
    reason = why_not_decided(optimizer, plan) if decides else None
    if reason is not None:
        raise UnsupportedError(reason)


def refusal(reason: Exception) -> CannotCompileError:
    """What to tell of ``reason``, for which no step will be served, and what helps."""
    if isinstance(reason, CompilerError):
        return CannotCompileError(reason.cause, reason.remedy)
    cause = reason if isinstance(reason, REASONS) else failed(reason)
    return CannotCompileError(str(cause), OTHER_MODES)


def may_decide(settings: ClipSettings, scaler: Scaler) -> bool:
    """Whether a device that can is to decide that a step does not count."""
    return settings.nonfinite == "skip" or scaler.found_inf is not None
