"""The passes on graphs, built by hand and captured: what they do, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx import Graph, GraphModule, Node

import compileclip
from compileclip.eager.operators import NotRewrittenError
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.passes.lift_scalars import LiftScalars

ATEN = torch.ops.aten


def step_graph(grads: list[Tensor], given: Tensor | None = None) -> tuple[GraphModule, list[Node]]:
    """``param -= grad`` for each gradient, behind the place of the norm."""
    graph = Graph()

    def placeholder(name: str, value: Tensor) -> Node:
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    max_norm = placeholder("max_norm", torch.tensor(1.0, dtype=torch.float64))
    norm = None if given is None else placeholder("norm", given)
    params = [placeholder(f"p{i}", torch.zeros_like(g)) for i, g in enumerate(grads)]
    nodes = [placeholder(f"g{i}", g) for i, g in enumerate(grads)]
    total = graph.call_function(torch.ops.compileclip.step_norm.default, (max_norm, norm))
    news = [graph.call_function(torch.sub, pair) for pair in zip(params, nodes, strict=True)]
    graph.output((total, *news))
    return GraphModule(torch.nn.Module(), graph), nodes


def count(graph: Graph, target: Any) -> int:
    return sum(node.target == target for node in graph.nodes)


def gradients(*dtypes: torch.dtype) -> list[Tensor]:
    return [torch.randn(5).to(dtype) * 3 for dtype in dtypes]


@pytest.mark.parametrize("write_grads", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 3, (torch.bfloat16, torch.float16), (torch.float32, torch.float64)],
)
def test_insert_norm_and_scale(dtypes: tuple[torch.dtype, ...], write_grads: bool) -> None:
    grads = gradients(*dtypes)
    module, nodes = step_graph(grads)
    ops_before = len(module.graph.nodes)
    insert = InsertNormAndScale(2.0, write_grads=write_grads)
    assert insert(module.graph, nodes) == len(grads)
    module.recompile()
    assert count(module.graph, torch.ops.compileclip.total_norm.default) == 1
    assert count(module.graph, torch.ops.compileclip.step_norm.default) == 0
    assert count(module.graph, ATEN.copy_.default) == (len(grads) if write_grads else 0)
    halves = sum(dtype.itemsize == 2 for dtype in dtypes)
    # Four for the coefficient and its cast, then a product for each gradient, two casts for half
    # precision; the norm takes the place of the marker.
    stores = len(grads) if write_grads else 0
    assert len(module.graph.nodes) == ops_before + 5 + len(grads) + 2 * halves + stores
    assert all("example_value" in n.meta for n in module.graph.nodes if n.target in vars(ATEN))

    params = [torch.zeros_like(g) for g in grads]
    given = [g.clone() for g in grads]
    bound = torch.tensor(1.0, dtype=torch.float64)
    norm, *news = module(bound, *params, *given)
    holders = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for holder, g in zip(holders, grads, strict=True):
        holder.grad = g.clone()
    assert torch.equal(norm, compileclip.clip_grad_norm_(holders, 1.0))
    for new, holder, g, original in zip(news, holders, given, grads, strict=True):
        assert torch.equal(new, -holder.grad)
        assert torch.equal(g, holder.grad if write_grads else original)


def test_a_given_norm_is_taken() -> None:
    grads = gradients(torch.float32, torch.float32)
    module, nodes = step_graph(grads, torch.tensor(4.0))
    InsertNormAndScale(2.0)(module.graph, nodes)
    module.recompile()
    assert count(module.graph, torch.ops.compileclip.total_norm.default) == 0
    bound = torch.tensor(1.0, dtype=torch.float64)
    norm, new, _ = module(bound, torch.tensor(4.0), *(torch.zeros(5) for _ in grads), *grads)
    assert norm == 4.0
    torch.testing.assert_close(new, -grads[0] / (4.0 + 1e-6))


def test_without_clipping_the_norm_is_measured() -> None:
    grads = gradients(torch.float32)
    module, nodes = step_graph(grads)
    assert InsertNormAndScale(2.0, clip=False)(module.graph, nodes) == 0
    module.recompile()
    norm, new = module(torch.tensor(0.0), torch.zeros(5), *grads)
    assert torch.equal(norm, compileclip.get_total_norm(grads))
    assert torch.equal(new, -grads[0])


def test_a_graph_without_the_marker_is_refused() -> None:
    graph = Graph()
    graph.output(graph.placeholder("x"))
    with pytest.raises(ValueError, match="this one has 0"):
        InsertNormAndScale(2.0)(graph, [])


def test_a_step_that_was_not_rewritten_raises() -> None:
    module, _ = step_graph(gradients(torch.float32))
    with pytest.raises(NotRewrittenError, match="would not be clipped"):
        module(torch.tensor(1.0), torch.zeros(5), torch.ones(5))


def updates() -> dict[str, Callable[..., Any]]:
    """Each way in which an optimizer uses a scalar, on ``x``, ``y``, ``z`` and the scalar ``s``."""
    return {
        "add": lambda x, y, z, s: x.add_(y, alpha=-s),
        "add, out of place": lambda x, y, z, s: x.add(y, alpha=s),
        "sub": lambda x, y, z, s: x.sub_(y, alpha=s),
        "addcdiv": lambda x, y, z, s: x.addcdiv_(y, z, value=-s),
        "addcmul": lambda x, y, z, s: x.addcmul_(y, z, value=1 - s),
        "lerp": lambda x, y, z, s: x.lerp_(y, 1 - s),
        "pow": lambda x, y, z, s: x.copy_(s**z),
        "foreach add": lambda x, y, z, s: torch._foreach_add_([x], [y], alpha=-s),
        "foreach addcdiv": lambda x, y, z, s: torch._foreach_addcdiv_([x], [y], [z], -s),
        "foreach addcmul": lambda x, y, z, s: torch._foreach_addcmul_([x], [y], [z], value=s),
        "foreach lerp": lambda x, y, z, s: torch._foreach_lerp_([x], [y], 1 - s),
        "foreach mul": lambda x, y, z, s: torch._foreach_mul_([x], s),
        "foreach div": lambda x, y, z, s: torch._foreach_div_([x], s),
        "foreach pow": lambda x, y, z, s: x.copy_(torch._foreach_pow(s, [z])[0]),
    }


def compilations(update: Callable[..., Any], *passes: Any) -> tuple[int, int]:
    """Run ``update`` for many values of its scalar; how often compiled, and how often rewritten."""
    compiled = rewritten = 0

    def backend(module: GraphModule, inputs: Any) -> Any:
        nonlocal compiled, rewritten
        for p in passes:
            rewritten += p(module.graph)
        module.recompile()
        function = torch._dynamo.lookup_backend("aot_eager_decomp_partition")(module, inputs)
        compiled += 1
        return function

    torch._dynamo.reset()
    x, y, z = (torch.rand(7) + 0.5 for _ in range(3))
    expected = x.clone()
    settings = {"s": 0.5}
    function = torch.compile(lambda x: update(x, y, z, settings["s"]), backend=backend)
    for i in range(6):
        settings["s"] = 0.5 + 0.05 * i
        function(x)
        update(expected, y, z, settings["s"])
        torch.testing.assert_close(x, expected)
    return compiled, rewritten


@pytest.mark.parametrize("name", updates())
def test_lift_scalars(name: str) -> None:
    compiled, rewritten = compilations(updates()[name], LiftScalars())
    assert compiled == 2  # constant, then variable
    assert rewritten >= 1 or name.startswith("add")  # Dynamo itself may have rewritten it


def test_scalars_need_lifting() -> None:
    """What the pass is for; should torch come to do it, the pass can go."""
    without = {name: compilations(update)[0] for name, update in updates().items()}
    assert sum(n > 2 for n in without.values()) >= 8, without


def test_constants_are_left_alone() -> None:
    def update(x: Tensor, y: Tensor) -> Tensor:
        return torch.lerp(x.add(y, alpha=2.0), y, 0.5) ** 2

    module = fx.symbolic_trace(update)
    before = module.print_readable(print_output=False)
    assert LiftScalars()(module.graph) == 0
    module.recompile()
    assert module.print_readable(print_output=False) == before


def test_a_number_beside_a_wider_gradient() -> None:
    """The norm is float64 then, and a product with it too, but not what torch's ``mul_`` stores."""
    grads = [torch.tensor(3.0), torch.ones(2, dtype=torch.float64)]
    module, nodes = step_graph(grads)
    assert InsertNormAndScale(2.0)(module.graph, nodes) == 2
    updates = [n for n in module.graph.nodes if n.target is torch.sub]
    scaled = [n.args[1].meta["example_value"] for n in updates]
    assert [t.dtype for t in scaled] == [g.dtype for g in grads]
    assert scaled[0].item() == pytest.approx(3 / 11**0.5)
