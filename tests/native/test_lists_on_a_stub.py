"""The functions of ``torch.nn.utils`` by native calls, on a stub for CUDA's driver."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import params_like
from torch import Tensor

import compileclip

pytest.importorskip("triton")
from stub_driver import STREAM, Copied, Launched, Stub, stubbed

from compileclip.lowering.triton import triton_foreach, triton_norm
from compileclip.native import native_foreach

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")

SHAPES = [(3, 4), (5,), (40000,), (0, 3), (), (2, 3, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(triton_foreach, "_is_there", lambda _: True)
    monkeypatch.setattr(triton_foreach, "_failed", False)
    monkeypatch.setattr(compileclip.eager.functional.native_norm, "total_norm", lambda *_: None)
    monkeypatch.setattr(native_foreach, "_entries", {})
    with stubbed(monkeypatch) as made:
        yield made


def params(dtype: torch.dtype = torch.float32) -> list[Any]:
    made = params_like(SHAPES, dtype)
    for p in made:
        p.grad = torch.randn_like(p)
    return made


CALLS: dict[str, Any] = {
    "get_total_norm": lambda p, order: compileclip.get_total_norm([q.grad for q in p], order),
    "clip_grad_norm_": lambda p, order: compileclip.clip_grad_norm_(p, 2.0, order),
    "clip_grads_with_norm_": lambda p, _: compileclip.clip_grads_with_norm_(
        p, 2.0, torch.tensor(3.0)
    ),
    "clip_grad_value_": lambda p, _: compileclip.clip_grad_value_(p, 0.5),
}


def told(launch: Launched) -> Any:
    """A launch without its addresses."""
    pairs = zip(launch.types, launch.arguments, strict=True)
    plain = [t if t[0] == "*" else (t, a) for t, a in pairs]
    size = (launch.programs, launch.threads, launch.shared)
    return launch.name, plain, size, launch.stream, launch.context


def lists_of(stub: Stub) -> tuple[list[int], list[int], list[int]]:
    """The addresses, sizes and blocks that were copied, and that launches are given."""
    (copied,) = stub.copies()
    assert isinstance(stub.records()[0], Copied), "before anything reads it"
    launches = [r for r in stub.launches() if r.name != "add_shares"]
    (addresses, sizes, blocks), *others = [r.arguments[:3] for r in launches]
    assert all(other == (addresses, sizes, blocks) for other in others)
    assert addresses == copied.place
    first, second = (sizes - addresses) // 8, (blocks - addresses) // 8
    words = list(copied.words)
    pairs = [n for word in words[second:] for n in (word & 0xFFFFFFFF, word >> 32)]
    assert len(pairs) == 2 * launches[0].programs
    return words[:first], words[first:second], pairs


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_launches_are_tritons_own(call: str, dtype: torch.dtype, order: float, stub: Stub) -> None:
    if order != 2 and "norm_" in call and "grads" in call:
        pytest.skip("no order")
    ps = params(dtype)
    found = []
    for quick in (False, True):
        stub.reset()
        versions = [p.grad._version for p in ps]
        CALLS[call](ps, order)
        written = [p.grad._version - v for p, v in zip(ps, versions, strict=True)]
        launches = stub.launches()
        assert len(stub.copies()) == quick, "one copy of the lists, and only there"
        if quick:
            assert lists_of(stub)[0] == [p.grad.data_ptr() for p in ps]
        found.append(([told(r) for r in launches], written))
        assert all(r.stream == STREAM for r in stub.records())
    assert found[0] == found[1]
    assert found[1][1] == [int(call != "get_total_norm")] * len(ps)


def test_the_lists(stub: Stub) -> None:
    assert native_foreach.CHUNK == triton_norm.CHUNK
    ps = params()
    for _ in range(2):
        stub.reset()
        norm = compileclip.clip_grad_norm_(ps, 1.0)
    copied, take, add, write = stub.records()
    assert isinstance(copied, Copied)
    assert (take.name, add.name, write.name) == ("take_shares", "add_shares", "_write")
    assert lists_of(stub) == (
        [p.grad.data_ptr() for p in ps],
        [p.numel() for p in ps],
        [0, 0, 1, 0, 2, 0, 2, 1, 2, 2, 4, 0, 5, 0],
    )
    assert copied.place == take.arguments[0] == write.arguments[0]
    assert copied.nbytes == 8 * (2 * len(SHAPES) + take.programs)
    assert take.arguments[3:] == (add.arguments[0], 0, 7)
    assert add.arguments[1] == write.arguments[3] == norm.data_ptr()


def test_parameters_without_gradients_are_left_out(stub: Stub) -> None:
    ps = params()
    for missing in (None, 1, 2):
        if missing is not None:
            ps[missing].grad = None
        stub.reset()
        compileclip.clip_grad_norm_(ps, 1.0)
    left = [p for p in ps if p.grad is not None]
    assert lists_of(stub)[0] == [p.grad.data_ptr() for p in left]


ODD: dict[str, Any] = {
    "of another dtype": lambda: torch.randn(3, 4, dtype=torch.float64),
    "transposed": lambda: torch.randn(4, 3).t(),
    "with gaps": lambda: torch.randn(3, 8)[:, ::2],
    "negated": lambda: torch._neg_view(torch.randn(3, 4)),
    "expanded": lambda: torch.randn(1, 4).expand(3, 4),
    "of six dimensions": lambda: torch.randn(1, 1, 1, 3, 1, 4),
    "a lazy clone": lambda: torch._lazy_clone(torch.randn(3, 4)),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_takes_the_other_way(odd: str, stub: Stub) -> None:
    tensors = [p.grad for p in params()]
    for _ in range(2):
        stub.reset()
        assert (
            native_foreach.run(tensors, tensors[0], native_foreach.Task(norm_type=2.0)) is None
            or stub.copies()
        )
        compileclip.get_total_norm(tensors)
    tensors[3] = ODD[odd]()
    stub.reset()
    assert native_foreach.run(tensors, tensors[0], native_foreach.Task(norm_type=2.0)) is None
    assert not stub.records()


def test_a_subclass_takes_the_other_way(stub: Stub) -> None:
    class Odd(Tensor):
        pass

    tensors = [p.grad for p in params()]
    compileclip.get_total_norm(tensors)
    assert native_foreach.run(tensors, tensors[0], native_foreach.Task(norm_type=2.0)) is not None
    tensors[1] = torch.randn(3).as_subclass(Odd)
    assert native_foreach.run(tensors, tensors[0], native_foreach.Task(norm_type=2.0)) is None


def test_tensors_that_share_memory_are_not_written(stub: Stub) -> None:
    task = native_foreach.Task(kind="clamp", bound=0.5)
    tensors = [torch.randn(8) for _ in range(3)]
    compileclip.lowering.triton.triton_foreach.clamp_(tensors, 0.5)
    assert native_foreach.run(tensors, tensors[0], task) is not None
    stub.reset()
    for other in (tensors[0], tensors[1][4:], tensors[2].view(2, 4)):
        for shared in ([*tensors, other], [other, *tensors]):
            assert native_foreach.run(shared, shared[0], task) is None
    assert not stub.records()
    assert native_foreach.run([tensors[0][4:], tensors[0][:4]], tensors[0], task) is not None


@pytest.mark.parametrize("call", range(4))
def test_an_error_of_the_driver(call: int, stub: Stub) -> None:
    ps = params()
    compileclip.clip_grad_norm_(ps, 1.0)
    stub.library.stub_fail_at(call)
    with pytest.raises(RuntimeError, match=r"error 719 \(a stub's error\)"):
        compileclip.clip_grad_norm_(ps, 1.0)


def test_it_can_be_switched_off(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    ps = params()
    compileclip.clip_grad_norm_(ps, 1.0)
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    stub.reset()
    compileclip.clip_grad_norm_(ps, 1.0)
    assert not stub.records()


def test_threads(stub: Stub) -> None:
    lists = [params() for _ in range(4)]
    compileclip.clip_grad_norm_(lists[0], 1.0)

    def run(ps: list[Any]) -> None:
        for _ in range(100):
            compileclip.clip_grad_norm_(ps, 1.0)

    threads = [threading.Thread(target=run, args=(ps,)) for ps in lists]
    pinned = stub.library.stub_count(0)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stub.library.stub_count(0) - pinned <= len(threads)
