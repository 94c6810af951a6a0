"""Steps by one native call, on a stub for CUDA's driver: what is launched, and what goes wrong."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import params_like
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_db

import compileclip
from compileclip.fallback import FallbackWarning
from compileclip.lowering import targets

pytest.importorskip("triton")
from stub_driver import STREAM, Copied, Launched, Stub, stubbed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")

SHAPES = [(3, 4), (5,), (2, 3, 2), (20000,), (1,)]
SCALED = {"grad_scale": 4.0, "found_inf": 0.0}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with stubbed(monkeypatch) as made, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "gradients come to the step")  # norms are never written
        yield made


def _configurations() -> Iterator[Any]:
    for info in optim_db:
        if info.step_requires_closure or info.optim_cls.__name__ in (
            "Adafactor",
            "Muon",
            "SparseAdam",
        ):
            continue
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):
            for extra in ({}, {"capturable": True}):
                names = info.optim_cls.__init__.__code__.co_varnames
                kwargs = {**given.kwargs, **extra}
                tensors = [v for v in _flat(kwargs) if isinstance(v, Tensor)]
                if not tensors and set(extra) <= set(names):
                    kind = "capturable" if extra else "host"
                    yield pytest.param(info.optim_cls, kwargs, id=f"{info.name}-{i}-{kind}")


def _flat(kwargs: dict[str, Any]) -> list[Any]:
    return [e for v in kwargs.values() for e in (v if isinstance(v, tuple) else (v,))]


def wrapped(make: Any, kwargs: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = params_like(SHAPES, dtype)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    return compileclip.wrap(make(groups, **kwargs), 1.0, mode="multi_tensor", **options)


def give(opt: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


def steps(opt: Any, count: int, **scaled: float) -> None:
    for seed in range(count):
        give(opt, seed)
        for name, value in scaled.items():
            setattr(opt, name, torch.tensor(value))
        opt.step()


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


@pytest.mark.parametrize("scaled", [{}, SCALED], ids=["bare", "scaled"])
@pytest.mark.parametrize(("make", "kwargs"), list(_configurations()))
def test_launches_are_tritons_own(make: Any, kwargs: Any, scaled: Any, stub: Stub) -> None:
    """Kernel by kernel and argument by argument, for every optimizer of torch's list."""
    options = {"nonfinite": "skip"} if kwargs.get("capturable") else {}
    if scaled and not kwargs.get("capturable"):
        pytest.skip("the host decides")
    opt = wrapped(make, kwargs, **options)
    steps(opt, 8, **scaled)
    kernels = opt._modes.kernels
    if kernels.steady is None:
        pytest.skip(f"{make.__name__}: its numbers are not found by a formula")
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


@pytest.fixture
def opt(stub: Stub) -> Any:
    """A wrapped AdamW in two groups, whose next step may be a native call."""
    made = wrapped(torch.optim.AdamW, {"lr": 1e-2})
    steps(made, 4)
    assert made._modes.kernels.steady is not None
    stub.reset()
    return made


def is_quick(opt: Any) -> bool:
    """Step; whether by the native call."""
    before = opt._modes.kernels.steady
    opt.step()
    return before is not None and opt._modes.kernels.steady is before


def all_params(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


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


CHANGES: dict[str, Any] = {
    "a parameter's memory": lambda o, p: setattr(p[0], "data", p[0].data.clone()),
    "a state's memory": lambda o, p: setattr(
        o.state[p[0]]["exp_avg"], "data", o.state[p[0]]["exp_avg"].data.clone()
    ),
    "a state": lambda o, p: o.state[p[2]].update(exp_avg=torch.zeros_like(p[2])),
    "a state in place of an equal one": lambda o, p: (
        o.state[p[2]].update({k: o.state[p[2]].pop(k) for k in ["exp_avg"]})
        or o.state[p[2]].update(exp_avg=torch.zeros_like(p[2]))
    ),
    "a count": lambda o, p: o.state[p[1]]["step"].add_(3),
    "no gradient": lambda o, p: setattr(p[1], "grad", None),
    "a gradient's layout": lambda o, p: setattr(p[0], "grad", p[0].grad.t().contiguous().t()),
    "a gradient that is to be negated": lambda o, p: setattr(
        p[1], "grad", torch._neg_view(p[1].grad)
    ),
    "a parameter": lambda o, p: o.param_groups[0]["params"].__setitem__(
        1, nn.Parameter(torch.ones(5))
    ),
    "a group": lambda o, p: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "a kind of number": lambda o, p: o.param_groups[0].update(lr=torch.tensor(0.1)),
    "another operation": lambda o, p: o.param_groups[0].update(maximize=True),
    "all state": lambda o, p: o.load_state_dict(o.state_dict()),
    "no bound": lambda o, p: setattr(o, "max_norm", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_that_is_another(change: str, opt: Any, stub: Stub) -> None:
    CHANGES[change](opt, all_params(opt))
    for p in all_params(opt):
        if p.grad is None and change != "no gradient":
            p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert not is_quick(opt)


def test_numbers_may_change(opt: Any, stub: Stub) -> None:
    for i in range(4):
        opt.param_groups[0].update(lr=0.1 / (1 + i), betas=(0.8, 0.9), weight_decay=0.1 + i)
        opt.max_norm = 0.5 + i
        assert is_quick(opt)
        assert opt._modes.kernels._places[torch.device("cpu")].max_norm.item() == 0.5 + i
    assert [float(state["step"]) for state in opt.state.values()] == [8.0] * 5


def test_it_can_be_switched_off(opt: Any, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    opt.step()
    assert not stub.launches()


def test_a_forked_process_launches_nothing(opt: Any, stub: Stub) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        steady = opt._modes.kernels.steady
        norm = steady.run(opt._settings, None)
        os.write(writer, b"nothing" if norm is None and not stub.launches() else b"launched")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 20) == b"nothing"
    assert is_quick(opt)


def test_threads_with_an_optimizer_each(stub: Stub) -> None:
    opts = [wrapped(torch.optim.AdamW, {"lr": 1e-2}) for _ in range(4)]
    for opt in opts:
        steps(opt, 4)

    def run(opt: Any) -> None:
        for _ in range(200):
            for p in all_params(opt):
                p.grad = p.grad.clone()
            opt.step()

    threads = [threading.Thread(target=run, args=(opt,)) for opt in opts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for opt in opts:
        assert {float(state["step"]) for state in opt.state.values()} == {204.0}
        for work in opt._modes.kernels._works:
            addresses = [p.grad.data_ptr() for p in work.bucket.params]
            assert work.resident[work.table.grads].tolist() == addresses


def test_memory_stays(stub: Stub) -> None:
    """Over steps with other gradients, and optimizers made and dropped; pinned memory included."""

    def some() -> None:
        opt = wrapped(torch.optim.AdamW, {"lr": 1e-2})
        for seed in range(50):
            give(opt, seed)
            stub.reset()
            opt.step()

    def held() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        some()
    before, pinned = held(), stub.library.stub_count(0)
    for _ in range(60):
        some()
    assert stub.library.stub_count(0) == pinned
    assert held() - before < 2**20  # observed: 0; a leak of the addresses alone would be 4 MiB


def test_few_calls_of_python(opt: Any) -> None:
    opt._clipped_before = None  # which looks at norms of a CPU alone
    found: list[str] = []
    sys.setprofile(lambda frame, event, _: found.append(event))
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    assert sum(event in ("call", "c_call") for event in found) <= 40  # observed: 37, of two groups


def test_a_scaler_and_a_verdict_are_read_where_they_are(stub: Stub) -> None:
    opt = wrapped(torch.optim.AdamW, {"lr": 1e-2, "capturable": True}, nonfinite="skip")
    steps(opt, 5, **SCALED)
    for value in (8.0, 2.0):
        stub.reset()
        opt.grad_scale = torch.tensor(value)
        assert is_quick(opt)
        (first, *_) = [r for r in stub.launches() if r.name == "compileclip_once"]
        assert opt.grad_scale.data_ptr() in first.arguments
        assert opt.found_inf.data_ptr() in first.arguments
    opt.grad_scale = torch.tensor(8.0, dtype=torch.float64)
    assert not is_quick(opt)
    del opt.grad_scale, opt.found_inf
    assert not is_quick(opt)
