"""passes.share_norm: large pointwise gradients bring their own norm along."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from compileclip.eager import reference
from compileclip.graph.inductor_passes import patches
from compileclip.passes.share_norm import LARGE, ShareNorm

TOTAL_NORM = torch.ops.compileclip.total_norm
ATEN = torch.ops.aten


def backward_like(order: float) -> Callable[..., Any]:
    """A pointwise gradient, one of a matrix product, one of a sum, and their norm."""

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        grads = [a * b + a, a @ b, a.sum(0)]
        return (TOTAL_NORM(grads, order), *grads)

    return function


def trace(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    module = make_fx(function, tracing_mode="fake")(*inputs)
    for node in module.graph.nodes:
        assert "val" in node.meta or node.op == "output"
    return module


def targets(module: GraphModule) -> Counter[Any]:
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [2.0, math.inf])
def test_a_pointwise_gradient_brings_its_share(order: float, dtype: torch.dtype) -> None:
    inputs = [torch.randn(8, 8).to(dtype) for _ in range(2)]
    module = trace(backward_like(order), *inputs)
    before = targets(module)
    assert ShareNorm(least=64)(module.graph) == 1
    module.recompile()
    added = targets(module) - before
    reduction = ATEN.amax.default if order == math.inf else ATEN.sum.default
    assert added[reduction] == 1
    assert targets(module)[TOTAL_NORM.default] == 1
    (norm,) = module.graph.find_nodes(op="call_function", target=TOTAL_NORM.default)
    gradient = next(iter(module.graph.output_node().args[0][1:2]))
    assert gradient not in norm.args[0]
    assert len(norm.args[0]) == 3
    assert all("val" in n.meta for n in module.graph.nodes if n.op == "call_function")

    total, *grads = module(*inputs)
    expected = reference.total_norm(grads, order)
    assert total.dtype == expected.dtype == torch.float32
    # The share is rounded to float32 once more. Observed: 0.
    torch.testing.assert_close(total, expected, rtol=1.2e-7, atol=0.0)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_it_neither_overflows_nor_underflows(scale: float) -> None:
    inputs = [torch.randn(8, 8) * scale, torch.ones(8, 8)]
    module = trace(backward_like(2.0), *inputs)
    assert ShareNorm(least=64)(module.graph) == 1
    module.recompile()
    total, *grads = module(*inputs)
    torch.testing.assert_close(total, reference.total_norm(grads, 2.0), rtol=1.2e-7, atol=0.0)
    assert math.isfinite(total)
    assert total > 0


@pytest.mark.parametrize(
    ("function", "dtype", "least"),
    [
        (backward_like(2.0), torch.float32, 65),
        (backward_like(3.0), torch.float32, 64),
        (backward_like(2.0), torch.float64, 64),
        (lambda a, b: TOTAL_NORM([a, b], 2.0), torch.float32, 1),
        (lambda a, b: TOTAL_NORM([a @ b, a.sum(0)], 2.0), torch.float32, 1),
        (lambda a, b: a * b, torch.float32, 1),
    ],
    ids=["small", "p = 3", "float64", "inputs", "products and sums", "no norm"],
)
def test_every_other_graph_stays(function: Any, dtype: torch.dtype, least: int) -> None:
    module = trace(function, torch.randn(8, 8).to(dtype), torch.randn(8, 8).to(dtype))
    before = str(module.graph)
    assert ShareNorm(least=least)(module.graph) == 0
    assert str(module.graph) == before


def test_views_of_a_pointwise_gradient_and_one_that_stands_twice() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        grad = (a * b).reshape(4, 16).permute(1, 0)
        return TOTAL_NORM([grad, b, grad], 2.0)

    inputs = [torch.randn(8, 8) for _ in range(2)]
    module = trace(function, *inputs)
    assert ShareNorm(least=64)(module.graph) == 1
    module.recompile()
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=1.2e-7, atol=0.0)


def test_compiled_training_step_takes_the_share() -> None:
    """Through Inductor, at the size from which on it is done."""
    side = math.isqrt(LARGE)

    def step(a: Tensor, b: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
        grad = a * b + a
        norm = TOTAL_NORM([grad, a[0] @ b], 2.0)
        return norm, param - grad * torch.clamp(1.0 / (norm + 1e-6), max=1.0)

    inputs = [torch.randn(side, side) for _ in range(3)]
    seen: list[int] = []

    class Spy(ShareNorm):
        def __call__(self, graph: Any) -> int:
            seen.append(super().__call__(graph))
            return seen[-1]

    compiled = torch.compile(step, fullgraph=True, options=patches({}, [Spy()]))
    with config.patch(fx_graph_cache=False):  # on a cache hit no pass runs
        results = compiled(*inputs)
    for ours, theirs in zip(results, step(*inputs), strict=True):
        # Observed: 1.2e-7.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert max(seen) == 1
