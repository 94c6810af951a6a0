"""What native code reads of tensors where torch keeps it is what torch says of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import params_like

import compileclip
from compileclip.lowering import threads
from compileclip.native import native_tensors, tensor_layout
from compileclip.native.native_tensors import Library, library

SAME, LAYOUT, STALE = range(3)
SHAPES = [(3, 4), (), (2, 1, 3, 1, 2, 2), (0, 5), (7,), (1,)]


@pytest.fixture(params=["where torch keeps it", "by torch's interface"])
def native(request: Any, monkeypatch: pytest.MonkeyPatch) -> Library:
    if request.param == "where torch keeps it":
        return library()
    library()  # which others have, made before
    monkeypatch.setattr(native_tensors, "layout_of_tensors", lambda: tensor_layout.NOTHING)
    monkeypatch.setattr(native_tensors, "tag_of_dicts", lambda: 0)
    return Library()


@pytest.fixture
def table() -> Any:
    shapes = [s for s in SHAPES if s]
    params: list[Any] = params_like(shapes)
    for p in params:
        p.grad = torch.randn_like(p)
    opt = compileclip.wrap(torch.optim.Adam(params), 1.0)
    for _ in range(3):
        opt.step()
    (made,) = opt._modes.kernels._plan.tables
    made.opt = opt
    return made


def status(native: Library, table: Any) -> int:
    return native.gather(native.torch, table.native, threads())


def test_they_are_found_here() -> None:
    """Elsewhere, all is asked for through torch's interface, which is slower."""
    assert tensor_layout.layout_of_tensors() != tensor_layout.NOTHING
    assert bool(tensor_layout.tag_of_dicts()) == (sys.version_info < (3, 14))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_addresses(dtype: torch.dtype, native: Library) -> None:
    params: list[Any] = params_like([s for s in SHAPES if s], dtype)
    opt = compileclip.wrap(torch.optim.Adam(params), 1.0)
    for k in range(4):
        for p in params:
            p.grad = torch.randn(p.numel() + k, dtype=dtype)[k:].view(p.shape)
        opt.step()
        (table,) = opt._modes.kernels._plan.tables
        assert status(native, table) == SAME
        assert table.addresses[table.grads].tolist() == [p.grad.data_ptr() for p in params]


def lazy(p: Any) -> None:
    p.data = torch._lazy_clone(p.data)


@torch.no_grad()
def in_order(p: Any) -> None:
    p.t_()


CHANGES: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "nothing": (SAME, lambda p, s: None),
    "another gradient": (SAME, lambda p, s: setattr(p, "grad", torch.ones(3, 4))),
    "a view": (SAME, lambda p, s: setattr(p, "grad", torch.ones(100)[7:19].view(3, 4))),
    "a lazy clone": (SAME, lambda p, s: setattr(p, "grad", torch._lazy_clone(p.grad))),
    "a parameter that is": (STALE, lambda p, s: (s.update(mine=p.data), lazy(p))),
    "a parameter that need not be copied": (SAME, lambda p, s: lazy(p)),
    "transposed": (LAYOUT, lambda p, s: setattr(p, "grad", torch.ones(4, 3).t())),
    "with gaps": (LAYOUT, lambda p, s: setattr(p, "grad", torch.ones(3, 8)[:, ::2])),
    "no gradient": (STALE, lambda p, s: setattr(p, "grad", None)),
    "another shape": (STALE, lambda p, s: p.grad.resize_(2, 6)),
    "another parameter's memory": (STALE, lambda p, s: setattr(p, "data", p.data.clone())),
    "a parameter in another order": (STALE, lambda p, s: in_order(p)),
    "a state's memory": (STALE, lambda p, s: s["exp_avg"].set_(torch.zeros(3, 4))),
    "a state's place": (
        STALE,
        lambda p, s: s["exp_avg"].set_(torch.zeros(20).untyped_storage(), 2, (3, 4)),
    ),
    "another state": (STALE, lambda p, s: s.update(exp_avg=torch.zeros(3, 4))),
    "the same state again": (SAME, lambda p, s: s.update(exp_avg=s.pop("exp_avg"))),
    "another count": (STALE, lambda p, s: s.update(step=torch.zeros(()))),
    "more state": (SAME, lambda p, s: s.update(mine=1)),
    "less state": (STALE, lambda p, s: s.pop("exp_avg_sq")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(change: str, native: Library, table: Any) -> None:
    expected, make = CHANGES[change]
    p = table.bucket.params[0]
    assert status(native, table) == SAME
    make(p, table.bucket.states[0])
    assert [status(native, table) for _ in range(2)] == [expected] * 2
    if expected == SAME:
        assert table.addresses[table.grads.start] == p.grad.data_ptr()


def test_a_gradient_that_is_to_be_negated(table: Any) -> None:
    p = table.bucket.params[0]
    p.grad = torch._neg_view(torch.ones(3, 4))
    assert status(library(), table) == STALE


def test_swapped_tensors(native: Library, table: Any) -> None:
    """``torch.utils.swap_tensors`` gives a Python object another tensor."""
    state = table.bucket.states[0]
    torch.utils.swap_tensors(state["exp_avg"], torch.zeros(3, 4))
    assert status(native, table) == STALE
