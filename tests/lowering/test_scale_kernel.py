"""The native kernel that scales tensors in place: to the bit as torch's ``mul_``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import same
from norms import random
from torch import Tensor

import compileclip
from compileclip.eager import reference
from compileclip.lowering import CHUNK
from compileclip.lowering.cpp import cpp_scale
from compileclip.native import native_build

FACTORS = [0.3, 1 / 3, float("nan")]
FACTOR = torch.tensor(FACTORS[0])
DTYPES = sorted(cpp_scale.SERVED, key=str)
# Of one thread, of several, of several chunks, and such that threads meet inside a tensor.
SIZES = [(1,), (0, 5, 31, 100), (CHUNK, CHUNK + 1, 0, 7), (7, 5 * CHUNK - 3, 3 * CHUNK)]


def as_torch(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """What torch makes of copies."""
    copies = [t.detach().clone() for t in tensors]
    for copy in copies:
        copy.mul_(factor)
    return copies


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch(
    dtype: torch.dtype, sizes: tuple[int, ...], factor: float, threads: int, restored: Any
) -> None:
    tensors = [random(n, dtype, seed=i) for i, n in enumerate(sizes)]
    by = torch.tensor(factor, dtype=dtype)
    expected = as_torch(tensors, by)
    torch.set_num_threads(threads)
    assert cpp_scale.scale_(tensors, by)
    assert all(map(same, tensors, expected))


@pytest.fixture
def restored() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_ends(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, np.inf, -np.inf, np.nan, info.max, info.tiny, info.smallest_normal / 3]
    for factor in (0.1, 3.0, 1e-300, 0.0):
        tensor = torch.tensor(numbers * 5, dtype=dtype)
        by = torch.tensor(factor, dtype=dtype)
        expected = as_torch([tensor], by)
        assert cpp_scale.scale_([tensor], by)
        assert same(tensor, expected[0])


def views() -> list[Any]:
    raw = np.zeros(401, dtype=np.uint8)[1:].view(np.float32)
    view: dict[str, Callable[[Tensor], Tensor]] = {
        "0-dim": lambda base: base[5],
        "empty": lambda base: base[:0],
        "transposed": lambda base: base.view(12, 20).t(),
        "permuted": lambda base: base.view(2, 3, 4, 10).permute(2, 0, 3, 1),
        "odd stride of one element": lambda base: base.as_strided((240, 1), (1, 77)),
        "offset": lambda base: base[3:],
        "parameter": torch.nn.Parameter,
        "negated lazily": torch._neg_view,
        "misaligned": lambda base: torch.from_numpy(raw).copy_(base[:100]),
    }
    return [pytest.param(make, id=name) for name, make in view.items()]


@pytest.mark.parametrize("make", views())
def test_layouts_that_are_served(make: Callable[[Tensor], Tensor]) -> None:
    tensor, around = make(base := random(240)), [random(3), random(5)]
    expected = as_torch([around[0], tensor, around[1]], FACTOR)
    outside = base.clone()
    inside = torch.zeros(240, dtype=torch.bool)
    if tensor.untyped_storage().data_ptr() == base.untyped_storage().data_ptr():
        inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    assert cpp_scale.scale_([around[0], tensor, around[1]], FACTOR)
    assert all(map(same, [around[0], tensor, around[1]], expected))
    assert same(base[~inside], outside[~inside])


def refused() -> list[Any]:
    base, subclass = random(12), type("Subclass", (Tensor,), {})
    return [
        pytest.param(base.to(torch.complex64), id="complex"),
        pytest.param(base.to(torch.bfloat16), id="bfloat16"),
        pytest.param(base.double(), id="another dtype"),
        pytest.param(base.as_subclass(subclass), id="subclass"),
        pytest.param(base.view(3, 4).to_sparse(), id="sparse"),
        pytest.param(torch._to_functional_tensor(base), id="functional"),
        pytest.param(torch._efficientzerotensor(3), id="without memory"),
        pytest.param(torch.ones(3, device="meta"), id="meta"),
        pytest.param(base[:4].expand(3, 4), id="expanded"),
        pytest.param(base.as_strided((3, 5), (2, 1)), id="overlapping"),
        pytest.param(base[::2], id="with gaps"),
    ]


@pytest.mark.parametrize("tensor", refused())
def test_what_is_left_to_torchs_operators(tensor: Tensor) -> None:
    others = [random(3), random(5)]
    before = [t.clone() for t in others]
    assert not cpp_scale.scale_([others[0], tensor, others[1]], FACTOR)
    assert not cpp_scale.scale_(others, FACTOR.to("meta"))
    assert not cpp_scale.scale_(others, FACTOR.double())
    assert all(map(same, others, before))


@pytest.mark.parametrize("shift", [0, 1, 3 * CHUNK])
def test_tensors_that_share_memory(shift: int) -> None:
    """One is scaled after the other, on as many threads as there are: no product is lost."""
    base = random(shift + 8 * CHUNK)
    expected = base.clone()
    for view in (expected[: 8 * CHUNK], expected[shift:]):
        view.mul_(FACTOR)
    apart = random(CHUNK, seed=1)
    assert cpp_scale.scale_([base[shift:], apart, base[: 8 * CHUNK]], FACTOR)
    assert same(base, expected)


def test_several_dtypes() -> None:
    """Found by fuzzing: torch multiplies tensors of 0 dimensions in the wider dtype."""
    tensors = [random(3), random(3)[0], random(3, torch.float64)]
    factor = torch.tensor(1 / 3, dtype=torch.float64)
    expected = as_torch(tensors, factor)
    reference.scale_(tensors, factor)
    assert all(map(same, tensors, expected))


def test_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping does, but for ``foreach=False``; what autograd saved before is known as written."""
    taken: list[int] = []
    serve = cpp_scale.scale_

    def recorded(tensors: Sequence[Tensor], factor: Tensor) -> bool:
        taken.append(len(tensors))
        return serve(tensors, factor)

    monkeypatch.setattr(cpp_scale, "scale_", recorded)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for foreach, calls in ((None, [2]), (True, [2, 2]), (False, [2, 2])):
        for p in params:
            p.grad = torch.ones_like(p)
        grad = params[0].grad
        assert grad is not None
        product = grad * torch.ones(3, requires_grad=True)
        compileclip.clip_grad_norm_(params, 0.5, foreach=foreach)
        assert taken == calls
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget() -> None:
        cpp_scale.available.cache_clear()
        native_build.load.cache_clear()

    tensor = random(9)
    expected = as_torch([tensor], FACTOR)
    forget()
    try:
        monkeypatch.setenv("CXX", "/nowhere/g++")
        assert not cpp_scale.scale_([tensor], FACTOR)
        reference.scale_([tensor], FACTOR)
        assert same(tensor, expected[0])
    finally:
        forget()
    monkeypatch.delenv("CXX")
    assert cpp_scale.scale_([tensor], FACTOR)
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    assert not cpp_scale.scale_([tensor], FACTOR)
