"""What Dynamo raises where it cannot compile a step, and what that means for a user."""

from __future__ import annotations

import re

import torch

from compileclip.fallback import CannotCompileError

# Of what ClippedOptimizer.step breaks a graph for.
REMEDY = "change that, or leave the step out of the graph"


def compiler_errors() -> tuple[type[Exception], ...]:
    """What Dynamo raises before a step has run.

    The last is for its limit of compilations, where a full graph was asked for
    (``torch._dynamo.config.recompile_limit``).
    """
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit


def as_refusal(error: BaseException) -> CannotCompileError:
    """The refusal that ``error``, which Dynamo raised, goes back to, or one that tells of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CannotCompileError):
            return cause
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "inner_exception", None)
    ours = re.search(r"(?:User-inserted graph break\. Message|compileclip): (.*)", str(error))
    if ours is not None:  # ClippedOptimizer.step or backward_leaves.py says why it breaks the graph
        return CannotCompileError(ours.group(1), REMEDY)
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return CannotCompileError(
            f"it was compiled {torch._dynamo.config.recompile_limit} times, the most that "
            "torch._dynamo.config.recompile_limit allows",
            "hold constant what changes from step to step (TORCH_LOGS=recompiles names it), or run "
            "it in eager mode",
        )
    reason = " ".join(str(error).strip().split("\n\n")[0].split())
    return CannotCompileError(
        f"{type(error).__name__}: {reason}",
        "run it in eager mode, or see the cause with TORCHDYNAMO_VERBOSE=1",
    )
