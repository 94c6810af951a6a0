"""Programs written by hand, and what eager makes of them: for the tests of the lowerings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from compileclip.lowering.program import Program

aten = torch.ops.aten
Build = Callable[..., Mapping[str, Proxy]]


def program(
    build: Build,
    operands: Mapping[str, torch.dtype],
    scalars: Mapping[str, float] | None = None,
    values: Mapping[str, torch.dtype] | None = None,
) -> Program:
    """The program that ``build`` writes down.

    Args:
        build: called with one proxy per name, by keyword; applies ATen's functional operations to
            them and returns what to store, by operand.
        operands: the dtype of each operand.
        scalars: a value of each scalar, for the metadata.
        values: the dtype of each 0-dim tensor.
    """
    graph = Graph()
    tracer = GraphAppendingTracer(graph)
    metas: dict[str, Tensor | float] = {
        **{name: torch.empty(8, dtype=dtype, device="meta") for name, dtype in operands.items()},
        **{n: torch.empty((), dtype=d, device="meta") for n, d in (values or {}).items()},
        **(scalars or {}),
    }
    inputs = {name: graph.placeholder(name) for name in metas}
    stored = build(**{name: Proxy(node, tracer) for name, node in inputs.items()})
    graph.output(tuple(proxy.node for proxy in stored.values()))
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = metas[node.name]
        elif node.op == "call_function":
            node.meta["val"] = _apply(node, lambda n: n.meta["val"])
    graph.lint()
    return Program(graph, tuple(stored))


def run_eager(
    program: Program,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, float] | None = None,
    values: Mapping[str, Tensor] | None = None,
    exact_sqrt: bool = True,
) -> dict[str, Tensor]:
    """What eager stores for one parameter; nothing is written in place.

    Args:
        program: the program.
        tensors: a tensor per operand.
        scalars: a float per scalar.
        values: a 0-dim tensor per value.
        exact_sqrt: whether square roots are correctly rounded; ATen's on x86 are not.
    """
    found: dict[Node, Any] = {}
    given = {**tensors, **(scalars or {}), **(values or {})}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = given[node.name]
        elif node.op == "call_function":
            if exact_sqrt and node.target is aten.sqrt.default:
                found[node] = sqrt(found[node.args[0]])
            else:
                found[node] = _apply(node, found.__getitem__)
    pairs = zip(program.stored, program.results, strict=True)
    return {name: found[node].to(tensors[name].dtype) for name, node in pairs}


def sqrt(x: Tensor) -> Tensor:
    """The square root, correctly rounded."""
    if x.dtype != torch.float64:
        return sqrt(x.double()).to(x.dtype)  # twice the digits and more: rounding twice is exact
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy(force=True)))).to(x.device)


def adamw(dtype: torch.dtype = torch.float32, grad: torch.dtype | None = None) -> Program:
    """AdamW as torch's single-tensor loop runs it, on a gradient scaled by the clip coefficient."""

    def build(
        param: Proxy,
        grad: Proxy,
        exp_avg: Proxy,
        exp_avg_sq: Proxy,
        norm: Proxy,
        max_norm: Proxy,
        decay: Proxy,
        one_minus_beta1: Proxy,
        beta2: Proxy,
        one_minus_beta2: Proxy,
        correction: Proxy,
        eps: Proxy,
        step_size: Proxy,
    ) -> dict[str, Proxy]:
        inverse = aten.reciprocal.default(aten.add.Tensor(norm, 1e-6))
        coef = aten.clamp.default(aten.mul.Tensor(inverse, max_norm), None, 1.0)
        clipped = aten.mul.Tensor(grad, coef)
        param = aten.mul.Tensor(param, decay)
        exp_avg = aten.lerp.Scalar(exp_avg, clipped, one_minus_beta1)
        decayed = aten.mul.Tensor(exp_avg_sq, beta2)
        exp_avg_sq = aten.addcmul.default(decayed, clipped, clipped, value=one_minus_beta2)
        root = aten.div.Tensor(aten.sqrt.default(exp_avg_sq), correction)
        denominator = aten.add.Tensor(root, eps)
        param = aten.addcdiv.default(param, exp_avg, denominator, value=step_size)
        return {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    norm = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    operands = {"param": dtype, "grad": grad or dtype, "exp_avg": dtype, "exp_avg_sq": dtype}
    return program(build, operands, ADAMW_SCALARS, {"norm": norm})


ADAMW_SCALARS = {
    "max_norm": 1.0,
    "decay": 1 - 1e-3 * 1e-2,
    "one_minus_beta1": 1 - 0.9,
    "beta2": 0.999,
    "one_minus_beta2": 1 - 0.999,
    "correction": (1 - 0.999**7) ** 0.5,
    "eps": 1e-8,
    "step_size": -1e-3 / (1 - 0.9**7),
}


def _apply(node: Node, read: Callable[[Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), read)
    assert callable(node.target)
    return node.target(*args, **kwargs)
