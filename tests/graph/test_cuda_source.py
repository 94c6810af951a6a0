"""What mode="inductor" would run on a GPU: how many kernels, and what they write."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import compileclip
from compileclip.graph import backend
from compileclip.graph.inductor_passes import patches

pytest.importorskip("triton", reason="triton makes CUDA code")
from offline_cuda import CudaSource, cuda_source


def step_source(
    count: int, monkeypatch: pytest.MonkeyPatch, write_grads: bool | None = None
) -> tuple[CudaSource, set[str]]:
    """The source for AdamW over ``count`` parameters, and the names of the gradients in it."""
    torch._dynamo.reset()
    params = [nn.Parameter(torch.zeros(64, 32)) for _ in range(count)]
    for p in params:
        p.grad = torch.zeros_like(p)
    captured: list[tuple[GraphModule, list[Any]]] = []

    def keep(module: GraphModule, inputs: Any) -> Any:
        places = module.graph.find_nodes(op="placeholder")
        captured.append((module, [node.meta["grapharg"].example for node in places]))
        return module.forward

    monkeypatch.setattr(backend, "compileclip", keep)
    adamw = torch.optim.AdamW(params, lr=1e-3, foreach=True, capturable=True)
    compileclip.wrap(adamw, 1.0, mode="inductor", write_grads=write_grads).step()
    ((module, inputs),) = captured
    inputs = lift_state(module, inputs)
    gradients = {id(p.grad) for p in params}
    names = {f"arg{i}_1" for i, x in enumerate(inputs) if id(x) in gradients}
    assert len(names) == count
    return cuda_source(lambda *args: module(*args), inputs, patches({})), names


def lift_state(module: GraphModule, inputs: list[Any]) -> list[Any]:
    """Make parameters and state inputs too, as AOTAutograd does, and return all inputs."""
    lifted = module.graph.find_nodes(op="get_attr")
    with module.graph.inserting_after(module.graph.find_nodes(op="placeholder")[-1]):
        for node in reversed(lifted):
            node.replace_all_uses_with(module.graph.placeholder(f"lifted_{node.name}"))
            module.graph.erase_node(node)
    module.recompile()
    return [*inputs, *(getattr(module, node.target) for node in lifted)]


@pytest.mark.parametrize("count", [3, 40, pytest.param(300, marks=pytest.mark.sweep)])
def test_few_kernels_and_no_store_to_a_gradient(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, gradients = step_source(count, monkeypatch)
    launches = source.launches
    print(f"{count} parameters: {len(launches)} kernels")
    assert 1 <= len(launches) <= 2 + math.ceil(count / 15)
    assert "_foreach_norm" not in source.text
    assert source.text.count("torch.ops.compileclip.total_norm.default(") == 1
    read = {v for launch in launches for v in launch.read}
    assert gradients <= read, "the update reads every gradient"
    written = {v for launch in launches for v in launch.written}
    assert written, "the update writes parameters"
    assert not gradients & written


def test_gradients_are_stored_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source, gradients = step_source(3, monkeypatch, write_grads=True)
    assert gradients <= {v for launch in source.launches for v in launch.written}


def test_a_share_of_the_norm_is_taken_where_the_gradient_is_made() -> None:
    def step(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        grad = torch.sin(a) * b
        norm = torch.ops.compileclip.total_norm([grad, c @ b], 2.0)
        p.sub_(grad * torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        return norm

    inputs = [torch.zeros(side, 1024) for side in (1024, 1024, 1024, 8)]
    launches = cuda_source(step, inputs, patches({})).launches
    # Without the share, the gradient is stored for the norm, and the norm reads it back.
    sums = [k for k in launches if k.kernel.startswith("triton_red") and "arg2_1" in k.read]
    assert len(sums) == 1
    stores = [k for k in launches if k.arguments.get("xnumel") == str(1024 * 1024)]
    assert [k.written for k in stores] == [{"arg0_1"}]
