"""The pass ``fuse_stock_clip``, on hand-built graphs and on what torch's clipping traces to."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import clone_params, set_grads
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule
from torch.linalg import vector_norm
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils.clip_grad import _clip_grads_with_norm_, _get_total_norm

from compileclip.eager import reference
from compileclip.passes.fuse_stock_clip import FuseStockClip

ATEN = torch.ops.aten
TOTAL_NORM = torch.ops.compileclip.total_norm.default
# torch sums squares in float32; ours are in float64. Largest relative error observed: 2.1e-07.
RTOL = {torch.float32: 1e-6, torch.complex64: 1e-6}
SHAPES = [(5, 3), (7,), (4, 4), (1,), (), (1, 1)]
ORDERS = [0.5, 1, 2, 3, 4, math.inf, -math.inf, 0, -1.0]


@dataclass
class Rewritten:
    """One graph: as text and op counts before and after the pass, and how often it fired."""

    fired: int
    before: str
    after: str
    ops_before: Counter[Any]
    ops: Counter[Any]
    graph: Graph


def rewritten(graph: Graph) -> Rewritten:
    before, ops_before = str(graph), ops_of(graph)
    fired = FuseStockClip()(graph)
    graph.lint()
    for node in graph.nodes:
        assert node.op == "output" or "val" in node.meta, node
    return Rewritten(fired, before, str(graph), ops_before, ops_of(graph), graph)


def ops_of(graph: Graph) -> Counter[Any]:
    return Counter(n.target for n in graph.nodes if n.op == "call_function")


def captured(fn: Callable[[], Any]) -> tuple[Any, list[Rewritten]]:
    """Compile ``fn`` with Inductor's decompositions, run the pass, then the rewritten graph."""
    graphs: list[Rewritten] = []

    def compiler(module: GraphModule, _: Any) -> Any:
        # Inductor does this too, so that what two norms share is shared.
        module = GraphModule(module, fx_graph_cse(module.graph))
        graphs.append(rewritten(module.graph))
        module.recompile()
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table)
    return torch.compile(fn, backend=backend)(), graphs


def twins(
    shapes: Sequence[Sequence[int]] = SHAPES, *dtypes: torch.dtype
) -> tuple[list[Any], list[Any]]:
    kinds = itertools.cycle(dtypes or (torch.float32,))
    values = [torch.randn([*s]).to(d) for s, d in zip(shapes, kinds, strict=False)]
    params = clone_params(values)
    others = clone_params(values)
    set_grads(params, seed=1)
    set_grads(others, seed=1)
    return params, others


def assert_close_grads(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=RTOL.get(a.dtype, 1e-6), atol=0)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("norm_type", ORDERS)
def test_any_order(norm_type: float, foreach: bool | None) -> None:
    params, others = twins()
    norm, (graph,) = captured(lambda: clip_grad_norm_(params, 0.5, norm_type, foreach=foreach))
    torch.testing.assert_close(
        norm, clip_grad_norm_(others, 0.5, norm_type, foreach=foreach), rtol=1e-6, atol=0
    )
    assert_close_grads(params, others)
    assert graph.fired == graph.ops[TOTAL_NORM] == 1
    assert graph.ops_before[ATEN._foreach_norm.Scalar] == (foreach is None)
    gone = ("_foreach_norm", "cat", "unsqueeze", "pow", "sum", "amax", "amin", "ne", "abs")
    assert not [op for op in graph.ops if any(str(op).startswith(f"aten.{g}.") for g in gone)]
    (node,) = (n for n in graph.graph.nodes if n.target == TOTAL_NORM)
    assert (len(node.args[0]), node.args[1]) == (len(params), float(norm_type))


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,),
        (torch.float16,),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64, torch.float32),
        (torch.complex64,),
    ],
)
def test_dtypes(dtypes: tuple[torch.dtype, ...], foreach: bool | None) -> None:
    """The norm keeps torch's dtype and is at least as near to the truth."""
    params, others = twins(SHAPES, *dtypes)
    grads = [p.grad.detach().clone() for p in params]
    norm, (graph,) = captured(lambda: clip_grad_norm_(params, 0.5, foreach=foreach))
    theirs = clip_grad_norm_(others, 0.5, foreach=foreach)
    assert graph.fired == 1
    assert norm.dtype == theirs.dtype
    truth = reference.total_norm([g.to(torch.complex128) for g in grads], 2.0)
    ours_off, theirs_off = abs(norm.double() - truth), abs(theirs.double() - truth)
    assert ours_off <= theirs_off + 2e-7 * truth
    coef = reference.clip_coef(0.5, norm)
    for p, g in zip(params, grads, strict=True):
        # The coefficient has torch's dtype, as before.
        torch.testing.assert_close(p.grad, g * coef.to(g.dtype.to_real()))


@pytest.mark.parametrize("shape", [(5, 3), (1,), ()])
def test_one_parameter(shape: tuple[int, ...]) -> None:
    params, others = twins([shape])
    norm, (graph,) = captured(lambda: clip_grad_norm_(params, 0.5))
    torch.testing.assert_close(norm, clip_grad_norm_(others, 0.5), rtol=1e-6, atol=0)
    assert_close_grads(params, others)
    assert (graph.fired, graph.ops[ATEN._foreach_norm.Scalar]) == (1, 0)


def test_two_calls_and_readers_after_the_clip() -> None:
    def clip(params: list[Any]) -> tuple[Tensor, Tensor]:
        norm = _get_total_norm([p.grad for p in params])
        _clip_grads_with_norm_(params, 0.5, norm)
        return norm, sum((p.grad.sum() for p in params), torch.zeros(()))

    params, others = twins()
    ours, (graph,) = captured(lambda: clip(params))
    torch.testing.assert_close(ours, clip(others), rtol=1e-6, atol=1e-6)
    assert_close_grads(params, others)
    assert graph.fired == 1


def test_two_clips_one_after_the_other() -> None:
    def clip(params: list[Any]) -> list[Tensor]:
        return [clip_grad_norm_(params, 0.5), clip_grad_norm_(params, 0.25, math.inf)]

    params, others = twins()
    norms, (graph,) = captured(lambda: clip(params))
    torch.testing.assert_close(norms, clip(others), rtol=1e-6, atol=0)
    assert_close_grads(params, others)
    assert graph.fired == graph.ops[TOTAL_NORM] == 2


@pytest.mark.parametrize("foreach", [None, False])
def test_clips_of_subsets(foreach: bool | None) -> None:
    """Disjoint subsets are clipped apart, and the rest is left alone."""

    def clip(params: list[Any]) -> list[Tensor]:
        return [
            clip_grad_norm_(params[:2], 0.5, foreach=foreach),
            clip_grad_norm_(params[2:4], 0.25, foreach=foreach),
        ]

    params, others = twins()
    norms, (graph,) = captured(lambda: clip(params))
    torch.testing.assert_close(norms, clip(others), rtol=1e-6, atol=0)
    assert_close_grads(params, others)
    assert torch.equal(params[5].grad, others[5].grad)
    assert graph.fired == 2


def test_totals_that_share_norms_of_single_tensors() -> None:
    def norms(params: list[Any]) -> list[Tensor]:
        grads = [p.grad for p in params]
        return [_get_total_norm(part, foreach=False) for part in (grads, grads[:2], grads[1:3])]

    params, others = twins()
    ours, (graph,) = captured(lambda: norms(params))
    torch.testing.assert_close(ours, norms(others), rtol=1e-6, atol=0)
    assert graph.fired == 3
    assert set(graph.ops) == {TOTAL_NORM}


@pytest.mark.parametrize("foreach", [True, False])
def test_norms_that_others_read_stay(foreach: bool) -> None:
    """Half a match: somebody logs the norm of one gradient."""

    def log(params: list[Any]) -> tuple[Tensor, Tensor]:
        grads = [p.grad for p in params]
        norms = torch._foreach_norm(grads, 2.0) if foreach else [vector_norm(grads[0], 2.0)]
        return norms[0], _get_total_norm(grads, foreach=foreach)

    params, _ = twins()
    _, (graph,) = captured(lambda: log(params))
    assert graph.fired == 0
    assert graph.before == graph.after


def test_clip_by_value_goes_through() -> None:
    params, others = twins()
    _, (graph,) = captured(lambda: clip_grad_value_(params, 0.1))
    clip_grad_value_(others, 0.1)
    assert_close_grads(params, others)
    assert graph.before == graph.after


def hand_built(build: Callable[..., Tensor], *inputs: Tensor) -> Rewritten:
    """The pass over the ATen graph of ``build``, nothing taken apart."""
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(build, tracing_mode="fake")(*inputs)
    graph = rewritten(module.graph)
    module.recompile()
    torch.testing.assert_close(module(*inputs), build(*inputs), rtol=1e-6, atol=0)
    return graph


NORM = ATEN.linalg_vector_norm.default
A, B = torch.randn(3, 4), torch.randn(5)


def test_whole_operators() -> None:
    graph = hand_built(lambda a, b: NORM(ATEN.stack.default([NORM(a, 3), NORM(b, 3)]), 3), A, B)
    assert (graph.fired, set(graph.ops)) == (1, {TOTAL_NORM})
    bf16 = [A.bfloat16(), B.bfloat16()]
    module = torch.fx.experimental.proxy_tensor.make_fx(
        lambda a, b: NORM(ATEN.stack.default([NORM(a), NORM(b)])), tracing_mode="fake"
    )(*bf16)
    after = rewritten(module.graph)
    assert list(after.ops) == [TOTAL_NORM, torch.ops.prims.convert_element_type.default]
    module.recompile()
    assert torch.equal(module(*bf16), reference.total_norm(bf16, 2.0).bfloat16())


@pytest.mark.parametrize(
    "build",
    [
        lambda a, b: NORM(ATEN.stack.default([NORM(a, 2), NORM(b, 2)]), 1),
        lambda a, b: NORM(ATEN.stack.default([NORM(a, 2), NORM(b, 1)]), 2),
        lambda a, b: NORM(ATEN.stack.default([NORM(a, 2), b.sum()]), 2),
        lambda a, b: NORM(ATEN.cat.default([NORM(a, 2, [0]), b]), 2),
        lambda a, b: NORM(ATEN.stack.default([NORM(a, 2), NORM(b, 2)]), 2, [0], True),
        lambda a, b: (ATEN.stack.default([(a**3).sum() ** (1 / 3), NORM(b, 3)]) ** 3).sum(),
        lambda a, b: NORM(ATEN.stack.default([(a**3).sum() ** (1 / 3), NORM(b, 3)]), 3),
        lambda a, b: NORM(ATEN.stack.default([(a**2).sum() ** (1 / 3), NORM(b, 2)]), 2),
        lambda a, b: NORM(ATEN.stack.default([(a**2).sum([0])[0] ** 0.5, NORM(b, 2)]), 2),
        lambda a, b: NORM(ATEN.stack.default([NORM(t, dtype=torch.float64) for t in (a, b)]), 2),
        lambda a, b: a.abs().max() + b.abs().max(),
    ],
)
def test_what_only_looks_like_a_total_norm_stays(build: Callable[..., Tensor]) -> None:
    a, b = A.abs(), B.abs()
    graph = hand_built(build, a, b)
    assert graph.fired == 0
    assert graph.before == graph.after


def test_a_write_between_the_norms_stops_it() -> None:
    def build(a: Tensor, b: Tensor) -> Tensor:
        norm = NORM(a)
        ATEN.mul_.Tensor(a, 2.0)
        return NORM(ATEN.stack.default([norm, NORM(b)]))

    from torch.fx.experimental.proxy_tensor import make_fx

    graph = rewritten(make_fx(build, tracing_mode="fake")(A.clone(), B).graph)
    assert graph.fired == 0


def test_it_runs_once() -> None:
    params, _ = twins()
    _, (graph,) = captured(lambda: clip_grad_norm_(params, 0.5))
    assert FuseStockClip()(graph.graph) == 0
    assert str(graph.graph) == graph.after
