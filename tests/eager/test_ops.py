"""The operator in graphs: opcheck, make_fx, torch.compile without a graph break."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_same, clone_params, params_like, same, set_grads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import compileclip

TOTAL_NORM = torch.ops.compileclip.total_norm.default


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 0.5, -1.0, 0.0])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64, torch.complex64),
    ],
)
def test_opcheck(dtypes: tuple[torch.dtype, ...], norm_type: float) -> None:
    tensors = [torch.randn(n, 3).to(dtype) for dtype in dtypes for n in (1, 4)]
    torch.library.opcheck(TOTAL_NORM, (tensors, norm_type))


def test_fake_tensors_have_the_dtype_of_real_ones() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128):
        real = compileclip.get_total_norm([torch.randn(3, dtype=dtype)])
        with FakeTensorMode():
            fake = compileclip.get_total_norm([torch.randn(3, dtype=dtype)])
        assert (fake.dtype, fake.shape, fake.device) == (real.dtype, real.shape, real.device)


def test_make_fx_sees_one_operator() -> None:
    tensors = [torch.randn(3, 4) for _ in range(50)]
    graph = make_fx(lambda *ts: compileclip.get_total_norm(ts))(*tensors)
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert called == [TOTAL_NORM]
    assert same(graph(*tensors), compileclip.get_total_norm(tensors))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_grad_norm_compiles_without_a_graph_break(dtype: torch.dtype, backend: str) -> None:
    params = params_like([(5, 4), (7,), (2, 3)], dtype)
    others = clone_params(params)
    graphs: list[Any] = []

    def clip(grads: list[Tensor]) -> Tensor:
        holders = [torch.empty_like(g, requires_grad=True) for g in grads]
        for holder, g in zip(holders, grads, strict=True):
            holder.grad = g
        return compileclip.clip_grad_norm_(holders, 0.5)

    def clip_parameters() -> Tensor:
        return compileclip.clip_grad_norm_(params, 0.5)

    def watched(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    set_grads(params, seed=3)
    set_grads(others, seed=3)
    compiled = torch.compile(clip_parameters, backend=watched, fullgraph=True)
    norm = compiled()
    assert same(norm, compileclip.clip_grad_norm_(others, 0.5))
    assert_same([p.grad for p in params], [p.grad for p in others], "gradient")
    assert len(graphs) == 1
    called = [n.target for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert called.count(torch.ops.compileclip.total_norm) == 1
