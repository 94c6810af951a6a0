"""What the native kernel of the total norm serves on a CPU, and where it steps aside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from norms import ORDERS, random, served, truth
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import compileclip
from compileclip.eager import reference
from compileclip.lowering.cpp import cpp_norm
from compileclip.native import native_build


def layouts() -> list[Any]:
    base = random(240)
    image = base.view(2, 3, 4, 10)
    raw = torch.from_numpy(np.zeros(401, dtype=np.uint8)[1:].view(np.float32))
    return [
        pytest.param(base[5], id="0-dim"),
        pytest.param(torch.zeros(0, 3), id="empty"),
        pytest.param(base.view(12, 20).t(), id="transposed"),
        pytest.param(image.permute(2, 0, 3, 1), id="permuted"),
        pytest.param(image.to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(base.as_strided((240, 1), (1, 77)), id="odd stride of one element"),
        pytest.param(base[3:], id="offset"),
        pytest.param(torch.nn.Parameter(base.clone()), id="parameter"),
        pytest.param(base.clone().requires_grad_() * 2, id="requires_grad"),
        pytest.param(torch._neg_view(base), id="negated lazily"),
        pytest.param(raw.copy_(random(100)), id="misaligned"),
        pytest.param(base[:12].expand(3, 12), id="expanded"),
        pytest.param(base[:12].as_strided((3, 5), (3, 1)), id="overlapping"),
        pytest.param(base[::2], id="with gaps"),
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tensor", layouts())
def test_layouts_that_are_served(tensor: Tensor, order: float) -> None:
    assert served([tensor], order).item() == pytest.approx(truth([tensor], order), rel=1.2e-7)
    assert not served([tensor], order).requires_grad


def refused() -> list[Any]:
    base, subclass = random(12), type("Subclass", (Tensor,), {})
    return [
        *(pytest.param(base, order, id=f"order {order}") for order in (3.0, 0.0, -2.0, -math.inf)),
        pytest.param(base.to(torch.complex64), 2.0, id="complex"),
        pytest.param(base.as_subclass(subclass), 2.0, id="subclass"),
        pytest.param(base.view(3, 4).to_sparse(), 2.0, id="sparse"),
        pytest.param(torch._to_functional_tensor(base), 2.0, id="functional"),
        pytest.param(torch._efficientzerotensor(3), 2.0, id="without memory"),
    ]


@pytest.mark.parametrize(("tensor", "order"), refused())
def test_what_is_left_to_torchs_operators(tensor: Tensor, order: float) -> None:
    assert cpp_norm.total_norm([tensor], order) is None
    assert cpp_norm.total_norm([random(3), tensor], order) is None


def test_tensors_without_data_are_left_to_torch() -> None:
    meta = torch.ones(3, device="meta")
    assert cpp_norm.total_norm([meta], 2.0) is None
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(random(3))
        assert isinstance(reference.total_norm([fake], 2.0), type(fake))
    assert cpp_norm.total_norm([fake], 2.0) is None

    def refuses(x: Tensor) -> Tensor:
        assert cpp_norm.total_norm([x], 2.0) is None
        return x.sum()

    torch.vmap(refuses)(random(12).view(3, 4))
    torch.func.grad(refuses)(random(4))


def test_a_mode_sees_torchs_operators() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kw or {}))

    seen: list[str] = []
    with Recorder():
        expected = reference.total_norm([random(9)], 2.0)
    assert "aten._foreach_norm.Scalar" in seen
    assert same(served([random(9)]), expected)


def test_default_device_and_compiled_graph() -> None:
    tensors = [random(1000), random(50).to(torch.bfloat16)]
    expected = served(tensors)
    with torch.device("meta"):
        assert same(compileclip.get_total_norm(tensors), expected)
    compiled = torch.compile(compileclip.get_total_norm, backend="aot_eager", fullgraph=True)
    assert same(compiled(tensors), expected)


def forget() -> None:
    cpp_norm.available.cache_clear()
    native_build.load.cache_clear()


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "/bin/false"])
def test_no_compiler(compiler: str, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    tensors = [random(1000), random(70_000, seed=1)]
    expected = pytest.approx(truth(tensors, 2.0), rel=1.2e-7)  # observed: 6e-8
    forget()
    try:
        monkeypatch.setenv("CXX", compiler)
        assert cpp_norm.total_norm(tensors, 2.0) is None
        assert compileclip.get_total_norm(tensors).item() == expected
        monkeypatch.delenv("CXX")
        assert cpp_norm.total_norm(tensors, 2.0) is None  # it is tried once
    finally:
        forget()
    assert not recwarn.list  # nobody asked for a kernel
    assert cpp_norm.total_norm(tensors, 2.0) is not None
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    assert cpp_norm.total_norm(tensors, 2.0) is None
