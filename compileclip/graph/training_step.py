"""``compileclip.compile``: a whole training step as one graph."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from compileclip.fallback import CannotCompileError, warn_fallback
from compileclip.graph.backward_leaves import (
    HOOKED,
    UNKNOWN,
    WITHOUT_GRADIENTS,
    Leaves,
    patch_dynamo,
)
from compileclip.graph.compile_errors import REMEDY, as_refusal, compiler_errors
from compileclip.graph.traced_step import mend_dynamo
from compileclip.lowering import is_disabled

F = TypeVar("F", bound=Callable[..., Any])

MOST_IN_VAIN = 3  # traces of steps in which nothing has a gradient


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

    Raises:
        ValueError: ``COMPILECLIP_DISABLE_PASSES`` names no pass.
    """
    from compileclip import passes

    passes.disabled_passes()
    kwargs.setdefault("backend", "compileclip")
    ways = _Ways(train_step, kwargs.pop("fullgraph", False), kwargs)

    @functools.wraps(train_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        if is_disabled():
            return train_step(*args, **kwargs)
        result, fallback = ways.run(args, kwargs)
        if fallback is not None:
            warn_fallback(*fallback)
        return result

    return cast(F, step)


class _Ways:
    """The ways to run a training step, and which of them serves.

    Args:
        train_step: the step as it is.
        demanded: whether one graph was asked for by ``fullgraph=True``.
        options: what else ``torch.compile`` takes.
    """

    def __init__(
        self, train_step: Callable[..., Any], demanded: bool, options: dict[str, Any]
    ) -> None:
        self._as_it_is = train_step
        self._one_graph = torch.compile(train_step, fullgraph=True, **options)
        self._apart = _copy(train_step)
        self._broken = torch.compile(self._apart, fullgraph=False, **options)
        self._demanded = demanded
        self._chosen: Callable[[Any, Any], Any] | None = None  # but one graph
        self._without_gradients = 0
        self._leaves = Leaves()

    def run(self, args: Any, kwargs: Any) -> tuple[Any, tuple[str, str, str, str] | None]:
        """One training step.

        Returns:
            What the step returned, and what to warn of, as ``warn_fallback`` takes it, or None.
        """
        if self._chosen is not None:
            return self._chosen(args, kwargs), None
        cause = HOOKED if self._leaves.hooked() else None if patch_dynamo() else UNKNOWN
        if cause is not None:
            refusal = CannotCompileError(cause, REMEDY)
            if self._demanded:
                raise refusal
            return self._instead(refusal, self._apart is not self._as_it_is, args, kwargs)
        mend_dynamo()
        # Off by default in torch 2.11 to 2.13, trace_autograd_ops lets backward() into the graph.
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True), self._leaves.stay_inputs():
                return self._one_graph(*args, **kwargs), None
        except compiler_errors() as error:
            # Of one graph it was raised while tracing or compiling, so nothing has run yet.
            if self._demanded:
                raise
            refusal, breaks = as_refusal(error), isinstance(error, torch._dynamo.exc.Unsupported)
        return self._instead(refusal, breaks, args, kwargs)

    def _instead(
        self, refusal: CannotCompileError, breaks: bool, args: Any, kwargs: Any
    ) -> tuple[Any, tuple[str, str, str, str]]:
        """The step in another way than one graph, for this time or for good."""
        for_good = refusal.cause != HOOKED or not self._leaves.hooked()  # hooks may be removed
        way, to = (self._in_graphs, "graph breaks") if breaks else (self._in_eager, "eager")
        if refusal.cause == WITHOUT_GRADIENTS:
            self._without_gradients += 1
            for_good = self._without_gradients == MOST_IN_VAIN
            if not for_good:
                way, to = self._in_eager, "eager"
        # What fails in every way is an error of this step alone, and the next one may be right.
        result = way(args, kwargs)
        if for_good:
            self._chosen = way
        what = "one graph" if breaks else "compileclip.compile"
        return result, (what, refusal.cause, refusal.remedy, to)

    def _in_graphs(self, args: Any, kwargs: Any) -> Any:
        mend_dynamo()
        # By the time that a later graph fails to compile, backward() may have run: that part then
        # runs in eager mode, and nothing runs twice. Hooks need a backward() that no graph holds.
        with torch._dynamo.config.patch(suppress_errors=True, trace_autograd_ops=False):
            return self._broken(*args, **kwargs)

    def _in_eager(self, args: Any, kwargs: Any) -> Any:
        return self._as_it_is(*args, **kwargs)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function like ``function`` that Dynamo does not know, or itself if it is no function.

    Dynamo keeps what it compiled by code object. A graph that holds ``backward()`` must not serve
    where that is to run in eager mode.
    """
    if isinstance(function, types.MethodType):
        copied = _copy(function.__func__)
        same = copied is function.__func__
        return function if same else types.MethodType(copied, function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    code, name = function.__code__, function.__name__
    code = code.replace(co_name=f"{code.co_name}_in_graphs")
    copy = types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy
