"""Steps by one native call, on a stub for CUDA's driver: what is launched, and what goes wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_registry import OPTIMIZERS, is_served, tensors_in, torch_inputs
from torch import Tensor

from compileclip.lowering import targets

pytest.importorskip("triton")
from stub_driver import STREAM, Copied, Launched, Stub
from stub_steps import SCALED, all_params, give, is_quick, opt, steps, stub, wrapped

__all__ = ["opt", "stub"]  # fixtures

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")


def _configurations() -> Iterator[Any]:
    for info, given, name in torch_inputs(is_served):
        extras: list[dict[str, Any]] = [{}]
        extras += [{"capturable": True}] if OPTIMIZERS[info.name].capturable else []
        for extra in [] if tensors_in(given) else extras:
            kwargs = {**given, **extra}
            kind = f"{name}-{'capturable' if extra else 'host'}"
            yield pytest.param(info.optim_cls, kwargs, {}, id=kind)
            if kwargs.get("capturable"):  # else the host decides on an overflow
                yield pytest.param(info.optim_cls, kwargs, SCALED, id=f"{kind}-scaled")


def rewind(opt: Any, saved: list[Any]) -> None:
    """Have step counts what they were before a step."""
    for work, (values, counts) in zip(opt._modes.kernels._works, saved, strict=True):
        bucket = work.bucket
        bucket.values.update(values)
        for name, count in counts.items():
            bucket.counts[name].copy_(count)
        bucket.versions = {k: (b, b._version) for k, b in bucket.counts.items()}
        opt._modes.kernels.steady = None


def saved(opt: Any) -> list[Any]:
    buckets = [work.bucket for work in opt._modes.kernels._works]
    return [(dict(b.values), {k: v.clone() for k, v in b.counts.items()}) for b in buckets]


def arguments(launches: list[Launched], total: Tensor, shares: dict[int, str]) -> list[Any]:
    """With names in the place of addresses that are new in each step."""
    new = {total.data_ptr(): "total", **shares}
    return [
        (
            r,
            tuple(
                new.get(a, a) if t[0] == "*" else a
                for t, a in zip(r.types, r.arguments, strict=True)
            ),
        )
        for r in launches
    ]


def as_told(record: Launched) -> tuple[Any, ...]:
    return record.name, record.types, record.programs, record.threads, record.shared, record.stream


@pytest.mark.parametrize(("make", "kwargs", "scaled"), list(_configurations()))
def test_launches_are_tritons_own(make: Any, kwargs: Any, scaled: Any, stub: Stub) -> None:
    """Kernel by kernel and argument by argument, for every optimizer of torch's list."""
    options = {"nonfinite": "skip"} if kwargs.get("capturable") else {}
    opt = wrapped(make, kwargs, **options)
    steps(opt, 8, **scaled)
    kernels = opt._modes.kernels
    if kernels.steady is None:  # there is no formula of their numbers, and Triton launches
        assert not OPTIMIZERS[make.__name__].has_formula
        return
    give(opt, 9)
    before = saved(opt)
    found = []
    for quick in (True, False):
        stub.reset()
        if not quick:
            rewind(opt, before)
        used = kernels.steady
        opt.step()
        assert (used is not None) == quick
        launches = stub.launches()
        shares = {launches[0].arguments[3]: "shares"}
        assert launches[0].name == "take_shares"
        found.append(arguments(launches, opt.total_norm, shares))
    native, tritons = found
    assert [as_told(r) for r, _ in native] == [as_told(r) for r, _ in tritons]
    assert [a for _, a in native] == [a for _, a in tritons]
    assert len(native) >= 3


def test_only_addresses_that_moved_are_copied(opt: Any, stub: Stub) -> None:
    work = opt._modes.kernels._works[1]  # three parameters
    row = work.resident.data_ptr() + 8 * work.table.grads.start
    assert is_quick(opt)
    assert not stub.copies()
    for moved in ([1], [0, 2], [0, 1, 2]):
        stub.reset()
        for i in moved:
            p = work.bucket.params[i]
            p.grad = p.grad.clone()
        assert is_quick(opt)
        (copy,) = stub.copies()
        assert (copy.place, copy.nbytes) == (row + 8 * moved[0], 8 * (moved[-1] - moved[0] + 1))
        assert copy.stream == STREAM
        addresses = [p.grad.data_ptr() for p in work.bucket.params]
        assert work.resident[work.table.grads].tolist() == addresses
        first = stub.records()[0]
        assert isinstance(first, Copied), "copied before anything reads it"


def test_pinned_memory_is_used_again_when_a_copy_is_done(opt: Any, stub: Stub) -> None:
    def step() -> int:
        for p in all_params(opt):
            p.grad = p.grad.clone()
        before = stub.library.stub_count(0)
        assert is_quick(opt)
        return int(stub.library.stub_count(0) - before)

    for _ in range(20):
        assert step() == 0
    stub.library.stub_set(0, 1)  # copies are under way, and stay so
    assert sum(step() for _ in range(20)) >= 36  # two buckets; some slots were free
    stub.library.stub_set(0, 0)
    assert sum(step() for _ in range(50)) == 0


def test_launches_are_on_the_current_stream(opt: Any, stub: Stub) -> None:
    followed: list[int] = []
    opt._modes.kernels.steady._follow = lambda stream: (
        followed.append(stream),
        setattr(opt._modes.kernels.steady, "_stream", stream),
    )
    for stream in (STREAM, 7, 7, STREAM):
        stub.reset()
        stub.stream = stream
        assert is_quick(opt)
        assert {r.stream for r in stub.records()} == {stream}
    assert followed == [7, STREAM]


def test_launches_are_in_the_devices_context(opt: Any, stub: Stub) -> None:
    """Whatever ``torch.cuda.set_device`` made current, which stays current."""
    stub.library.stub_set_context(0xAB)
    try:
        before = stub.library.stub_count(2)
        assert is_quick(opt)
        assert {r.context for r in stub.launches()} == {0xC0}
        assert stub.library.stub_count(2) == before + 1
        current = ctypes.c_void_p()
        stub.library.cuCtxGetCurrent(ctypes.byref(current))
        assert current.value == 0xAB
    finally:
        stub.library.stub_set_context(0xC0)


@pytest.mark.parametrize("call", range(6))
def test_an_error_of_the_driver(call: int, opt: Any, stub: Stub) -> None:
    """Is raised, and names itself; step counts say what was done."""
    for p in all_params(opt):
        p.grad = p.grad.clone()
    values = [dict(work.bucket.values) for work in opt._modes.kernels._works]
    counts = [float(state["step"]) for state in opt.state.values()]
    stub.library.stub_fail_at(call)
    with pytest.raises(RuntimeError, match=r"error 719 \(a stub's error\)"):
        opt.step()
    assert [dict(work.bucket.values) for work in opt._modes.kernels._works] == values
    assert [float(state["step"]) for state in opt.state.values()] == counts
    stub.reset()
    opt.step()
    assert len(stub.launches()) >= 4
    # What the device has is copied again where it is not known.
    for work in opt._modes.kernels._works:
        addresses = [p.grad.data_ptr() for p in work.bucket.params]
        assert work.resident[work.table.grads].tolist() == addresses


def test_a_capture_takes_the_other_way(monkeypatch: pytest.MonkeyPatch, stub: Stub) -> None:
    """And reads addresses from memory of its own at each replay, which no other step writes."""
    opt = wrapped(torch.optim.AdamW, {"lr": 1e-2, "capturable": True})
    steps(opt, 4)
    stub.reset()
    stub.library.stub_set(1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
        assert not is_quick(opt)
    stub.library.stub_set(0, 0)
    copies = stub.copies()
    assert len(copies) == 2, "one for each bucket"
    assert opt._modes.kernels.steady is None
    assert opt._modes.kernels.why_not is None
    give(opt, 1)
    opt.step()
    for _ in range(3):
        stub.reset()
        assert is_quick(opt)
        assert len(stub.copies()) == 2, "a replay may have written other addresses there"
        assert not {c.origin for c in copies} & {c.origin for c in stub.copies()}


@pytest.mark.parametrize("write", [True, None])
def test_gradients_that_are_written(write: bool | None, stub: Stub) -> None:
    opt = wrapped(torch.optim.SGD, {"lr": 1e-2}, write_grads=write)
    steps(opt, 4)
    versions = [p.grad._version for p in all_params(opt)]
    assert is_quick(opt)
    after = [p.grad._version for p in all_params(opt)]
    assert [b - a for a, b in zip(versions, after, strict=True)] == [int(write is True)] * 5
    give(opt, 1)  # of which two could share memory
    assert is_quick(opt) == (write is None)


def test_versions_of_parameters(opt: Any) -> None:
    params = all_params(opt)
    versions = [p._version for p in params]
    assert is_quick(opt)
    assert [p._version for p in params] == [v + 1 for v in versions]
