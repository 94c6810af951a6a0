"""Mode ``inductor``: the optimizer's own step, captured by Dynamo and compiled by Inductor.

Dynamo traces the step as it is (any optimizer that it can trace, pointwise or not); the pass
``insert_norm_and_scale`` puts the norm and the scale before the update; Inductor generates the
kernels. Private parts of torch used here, read in torch 2.11 to 2.13: ``Optimizer.step``'s
wrappers, ``meta["grapharg"]`` of Dynamo's placeholders.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.optim import Optimizer

from compileclip.distributed.shards import is_sharded
from compileclip.eager import optimizer_state
from compileclip.eager.operators import NotRewrittenError
from compileclip.fallback import CannotCompileError, warn_fallback
from compileclip.graph import compile_errors, traced_step
from compileclip.graph.compile_errors import as_refusal
from compileclip.lowering import is_disabled
from compileclip.settings import ClipSettings


class CompiledStep:
    """The compiled step of one optimizer.

    Attributes:
        compilations: how often the step was compiled.
        refusal: why it is not compiled (any more), or None.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.compilations = 0
        self.refusal: CannotCompileError | None = None
        self._optimizer = optimizer
        self._params: Sequence[Tensor] = ()
        self._max_norm = torch.zeros((), dtype=torch.float64)
        self._compiled: dict[Any, Callable[..., Tensor]] = {}

    def run(
        self, settings: ClipSettings, params: Sequence[Tensor], norm: Tensor | None
    ) -> Tensor | None:
        """Clip and step, all in one graph.

        Args:
            settings: how to clip.
            params: the parameters that have a gradient, in the order of the norm; not empty.
            norm: the total norm if it was taken already, and may be stepped with; or None, and then
                ``nonfinite="skip"`` is decided in the graph.

        Returns:
            The total norm; or None where the step could not be compiled, and nothing has changed.

        Raises:
            ValueError: ``COMPILECLIP_DISABLE_PASSES`` names no pass.
        """
        if self.refusal is not None or is_disabled():
            return None
        self._params = params
        try:
            self._check(params)
            if settings.max_norm is not None:
                self._max_norm.fill_(settings.max_norm)
            skip = settings.nonfinite == "skip" and norm is None
            return self._function(settings, skip)(self._max_norm, norm)
        except CannotCompileError as refusal:
            self.refusal = refusal
        except NotRewrittenError:
            # set_stance("force_eager") and the like, which may end again: no lasting refusal.
            warn_fallback(
                'mode="inductor"',
                "torch.compile ran the step without compiling it (torch.compiler.set_stance?)",
                "let torch.compile compile, or take mode='eager'",
            )
            return None
        except compile_errors.compiler_errors() as error:
            self.refusal = as_refusal(error)
        finally:
            self._params = ()
        warn_fallback('mode="inductor"', self.refusal.cause, self.refusal.remedy)
        return None

    def refuse(self, cause: str) -> None:
        """Have no step compiled, of an optimizer of which ranks hold parts."""
        if self.refusal is None:
            self.refusal = CannotCompileError(cause, "take mode='auto' or mode='eager'")
            warn_fallback('mode="inductor"', self.refusal.cause, self.refusal.remedy)

    @property
    def why_not(self) -> tuple[str, str] | None:
        """Why the step is not compiled (any more), and what helps; None if it is."""
        return None if self.refusal is None else (self.refusal.cause, self.refusal.remedy)

    def _check(self, params: Sequence[Tensor]) -> None:
        from compileclip import passes

        left_out = passes.why_not_inserted()
        if left_out is not None:
            raise CannotCompileError(left_out, "leave that name out there, or take mode='eager'")
        if any(is_sharded(p) for p in params):
            raise CannotCompileError("a parameter is a DTensor", "use mode='eager'")
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise CannotCompileError("a gradient is sparse", "use mode='eager'")
        if any(group.get("fused") for group in self._optimizer.param_groups):
            raise CannotCompileError(
                "fused=True makes the update one kernel of torch's own",
                "make the optimizer without fused=True, or take mode='eager'",
            )

    def _function(self, settings: ClipSettings, skip: bool) -> Callable[..., Tensor]:
        from compileclip.passes.insert_norm_and_scale import InsertNormAndScale

        insert = InsertNormAndScale(
            settings.norm_type, settings.max_norm is not None, settings.write_grads is True, skip
        )
        if insert not in self._compiled:
            # Made while Dynamo traces, state would send it another way when it traces anew.
            optimizer_state.initialize_state(self._optimizer)
            self._compiled[insert] = torch.compile(
                _capture(self._optimizer, skip),
                backend=lambda graph, inputs: self._compile(insert, graph, inputs),
                fullgraph=True,
            )
        return self._compiled[insert]

    def _compile(self, insert: Any, module: GraphModule, inputs: list[Tensor]) -> Any:
        """The backend: what Dynamo calls with the captured graph."""
        from compileclip.graph.backend import compileclip as compile_graph

        insert(module.graph, _gradient_nodes(module, self._params))
        module.recompile()
        compiled = compile_graph(module, inputs)
        self.compilations += 1  # Dynamo may stop it in order to trace anew: that is not another one
        return compiled


def _capture(optimizer: Optimizer, skip: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function that Dynamo can trace: the norm's place, then the optimizer's raw step."""
    raw_step = optimizer_state.raw_step(optimizer)

    def step(max_norm: Tensor, norm: Tensor | None) -> Tensor:
        total_norm: Tensor = torch.ops.compileclip.step_norm(max_norm, norm)
        if skip:
            groups = optimizer.param_groups
            params = [p for group in groups for p in group["params"] if p.grad is not None]
            finite = total_norm.isfinite()
            traced_step.step_where(finite, lambda: raw_step(optimizer), params, optimizer.state)
        else:
            raw_step(optimizer)
        return total_norm

    # Dynamo counts recompilations by code object, which all closures of a function share.
    code = step.__code__.replace(co_name=f"step_of_{type(optimizer).__name__}")
    return types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)


def _gradient_nodes(module: GraphModule, params: Sequence[Tensor]) -> list[Node]:
    """The placeholder of each parameter's gradient, in the order of ``params``."""
    nodes: dict[int, Node] = {}
    for node in module.graph.nodes:
        argument = node.meta.get("grapharg") if node.op == "placeholder" else None
        if argument is not None:
            nodes[id(argument.example)] = node
    found = [nodes.get(id(p.grad)) for p in params]
    missing = [tuple(p.shape) for p, node in zip(params, found, strict=True) if node is None]
    if missing:
        raise CannotCompileError(
            f"the step does not read the gradients of {len(missing)} parameters, the first of "
            f"shape {missing[0]}, so they are no part of its graph",
            "take mode='eager'",
        )
    return [node for node in found if node is not None]
