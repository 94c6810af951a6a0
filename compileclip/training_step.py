"""``compileclip.compile``: a whole training step as one graph."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from compileclip.fallback import warn_fallback
from compileclip.traced import as_refusal, compiler_errors, mend_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def compile(train_step: F, **kwargs: Any) -> F:
    """Compile a training step: forward, ``backward()``, clip, update and ``zero_grad()``.

    One graph holds all of it, so gradients that ``zero_grad()`` drops never become ``.grad``, and
    the scale is fused into the update. Where the step cannot be one graph, ``FallbackWarning`` says
    why and it is compiled with graph breaks; where it cannot be compiled at all, or Dynamo has
    compiled it too often, it runs in eager mode.

    Args:
        train_step: a function that calls ``loss.backward()``, ``step()`` of optimizers that
            ``compileclip.wrap`` returned, and ``zero_grad()``. Learning rates and ``max_norm`` may
            change between calls, and so may betas and momentum, without compiling each value.
        **kwargs: what ``torch.compile`` takes. ``backend`` is ``"compileclip"`` unless given;
            ``fullgraph=True`` makes a graph break an error.

    Returns:
        The compiled function. With ``COMPILECLIP_DISABLE=1`` in the environment it runs
        ``train_step`` as it is.
    """
    kwargs.setdefault("backend", "compileclip")
    demanded = kwargs.pop("fullgraph", False)
    one_graph = torch.compile(train_step, fullgraph=True, **kwargs)
    broken = torch.compile(train_step, fullgraph=False, **kwargs)
    chosen: Callable[..., Any] = one_graph

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal chosen
        if chosen is train_step or os.environ.get("COMPILECLIP_DISABLE") == "1":
            return train_step(*args, **kwargs)
        mend_dynamo()
        # Off by default in torch 2.11 to 2.13, trace_autograd_ops lets backward() into the graph.
        config = torch._dynamo.config
        if chosen is broken:
            # By the time that a later graph fails to compile, backward() may have run: that part
            # then runs in eager mode, and nothing runs twice.
            with config.patch(suppress_errors=True):
                return broken(*args, **kwargs)
        try:
            with config.patch(trace_autograd_ops=True):
                return one_graph(*args, **kwargs)
        except compiler_errors() as error:
            # Of one graph it was raised while tracing or compiling, so nothing has run yet.
            if demanded:
                raise
            refusal = as_refusal(error)
            if isinstance(error, torch._dynamo.exc.Unsupported):
                chosen = broken
                warn_fallback("one graph", refusal.cause, refusal.remedy, to="graph breaks")
            else:
                chosen = train_step
                warn_fallback("compileclip.compile", refusal.cause, refusal.remedy)
        return step(*args, **kwargs)

    return cast(F, step)
