"""Step counts that stay on a GPU, and steps that it decides on: ``capturable=True``, "skip", AMP.

On a GPU, or in Triton's interpreter on the CPU, where torch's optimizers are told that a CPU is as
good, and powers are numpy's.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clone_params, flat_state, params_like, same, set_grads
from test_optim_db import all_params, grads_of
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

import compileclip
from compileclip.fallback import FallbackWarning
from compileclip.lowering import targets

pytest.importorskip("triton")
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

__all__ = ["device"]  # a fixture
SHAPES = [(3, 4), (5,), (3, 400), (1,)]
NAMES = ["Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adamax", "Adadelta", "ASGD", "Rprop"]
MODULES = [f"torch.optim.{name.lower()}" for name in NAMES]
# In the interpreter, without fused multiply-adds, of values up to about 4; observed: 2.4e-7.
CLOSE = 1e-6


def power(x: Any, y: Any) -> Any:
    data = np.power(x.handle.data, y.handle.data)
    return tl.tensor(TensorHandle(data, y.handle.dtype), y.type)


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    monkeypatch.setattr(targets, "of", targets.Gpu)
    monkeypatch.setattr(targets, "Cpu", lambda: targets.Gpu(torch.device("cpu")))
    monkeypatch.setattr(libdevice, "pow", power)
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "_get_capturable_supported_devices"):
            supported = lambda supports_xla=True: ["cpu", "cuda"]  # noqa: E731
            monkeypatch.setattr(module, "_get_capturable_supported_devices", supported)


@contextmanager
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)  # of the interpreter
        yield


@contextmanager
def no_wait(opt: Any) -> Iterator[None]:
    """Within it, waiting for the device is an error; in the interpreter, asking whether it may."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            item = Tensor.item

            def counts(settings: Any, found_inf: Any, norm: Any) -> bool:
                assert settings.nonfinite == "propagate", "the host decides"
                assert found_inf is None, "the host decides"
                return True

            def read(tensor: Tensor) -> Any:
                caller = sys._getframe(1).f_globals["__name__"]
                assert caller == "compileclip.capture", "the host asks"  # a number that torch wraps
                return item(tensor)

            patch.setattr(compileclip.eager, "counts", counts)
            patch.setattr(Tensor, "item", read)
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def maker(name: str, **options: Any) -> Callable[[Any], Optimizer]:
    return lambda p: getattr(torch.optim, name)(p, lr=0.01, foreach=False, **options)


def twins(make: Callable[[Any], Optimizer], device: str, **options: Any) -> tuple[Any, Any]:
    params = [nn.Parameter(p.detach().to(device)) for p in params_like(SHAPES)]
    ours = compileclip.wrap(make(params), 1.0, mode="multi_tensor", **options)
    options = {"write_grads": False, **options}
    return ours, compileclip.wrap(make(clone_params(params)), 1.0, mode="eager", **options)


def check(ours: Any, theirs: Any, least: float = 0.0) -> None:
    close = max(least, 0.0 if ours.total_norm.is_cuda else CLOSE)
    norms = (ours.total_norm, theirs.total_norm)
    torch.testing.assert_close(*norms, rtol=1.2e-7, atol=0, equal_nan=True)
    pairs = list(zip(all_params(ours), all_params(theirs), strict=True))
    if flat_state(theirs):  # it has none after a first step that did not count
        both = list(zip(flat_state(ours), flat_state(theirs), strict=True))
        assert all(name == other for (name, _), (other, _) in both)
        pairs += [(a, b) for (_, a), (_, b) in both]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=close, atol=close, check_device=False)


def give(opts: tuple[Any, ...], seed: int, bad: float | None = None) -> None:
    for opt in opts:
        set_grads(all_params(opt), seed, scale=0.1 if seed % 2 else 10)
        if bad is not None:
            all_params(opt)[seed % len(SHAPES)].grad.view(-1)[0] = bad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_capturable_and_steps_that_do_not_count(name: str, bad: float, device: str) -> None:
    ours, theirs = twins(maker(name, capturable=True), device, nonfinite="skip")
    for seed in range(9):
        give((ours, theirs), seed, bad if seed in (0, 4) else None)
        with no_fallback():
            if seed > 1:
                with no_wait(ours):
                    ours.step()
            else:
                ours.step()
        theirs.step()
        check(ours, theirs)
    kernels = ours._modes.kernels
    assert kernels.compilations == 1
    assert kernels.decides
    assert "waits for the norm" not in ours.explain()
    steps = [state["step"].item() for state in ours.state.values()]
    assert steps == [7] * len(steps)


@pytest.mark.parametrize("name", ["AdamW", "RAdam", "SGD", "SGD, momentum", "Adagrad"])
def test_skip_without_capturable(name: str, device: str) -> None:
    """Counts go to the device where they can; where there are none, a kernel decides as well."""
    makers: dict[str, Callable[[Any], Optimizer]] = {
        "SGD": lambda p: SGD(p, lr=0.1, weight_decay=0.1, foreach=False),
        "SGD, momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
        "Adagrad": lambda p: Adagrad(p, lr=0.1, lr_decay=0.1, foreach=False),
    }
    decides = name != "Adagrad"  # its step asks for the count as a number
    ours, theirs = twins(makers.get(name) or maker(name), device, nonfinite="skip")
    for seed in range(8):
        give((ours, theirs), seed, math.nan if seed in (0, 3) else None)
        with no_fallback():
            if decides and seed > 3:
                with no_wait(ours):
                    ours.step()
            else:
                ours.step()
        theirs.step()
        # Of counts on the host, eager takes powers in double precision. Observed: 1.5e-6.
        check(ours, theirs, least=1e-5)
    assert ours._modes.kernels.decides == decides
    assert ("waits for the norm" in ours.explain()) != decides


def test_propagate_and_raise(device: str) -> None:
    ours, theirs = twins(maker("AdamW", capturable=True), device, nonfinite="raise")
    for seed in range(4):
        give((ours, theirs), seed, math.nan if seed == 2 else None)
        for opt in (ours, theirs):
            if seed == 2:
                with pytest.raises(RuntimeError, match="non-finite"):
                    opt.step()
            else:
                opt.step()
        check(ours, theirs)


def test_hyperparameters_and_the_bound_change_without_a_compilation(device: str) -> None:
    ours, theirs = twins(maker("NAdam", capturable=True, weight_decay=0.1), device)
    for seed in range(6):
        give((ours, theirs), seed)
        for opt in (ours, theirs):
            opt.max_norm = 0.5 + seed
            opt.param_groups[0].update(lr=0.01 / (1 + seed), betas=(0.9 - seed / 100, 0.99))
        with no_fallback(), no_wait(ours) if seed > 1 else warnings.catch_warnings():
            ours.step()
        theirs.step()
        check(ours, theirs)
    kernels = ours._modes.kernels
    assert kernels.compilations == 1
    ours.max_norm = 7.5  # as a captured step is to see it
    assert kernels._max_norm.item() == 7.5


def test_a_learning_rate_on_the_device(device: str) -> None:
    def make(params: Any) -> Optimizer:
        rate = torch.tensor(0.01, device=device)
        return AdamW(params, lr=rate, foreach=False, capturable=True)

    ours, theirs = twins(make, device)
    for seed in range(5):
        give((ours, theirs), seed)
        for opt in (ours, theirs):
            opt.param_groups[0]["lr"].fill_(0.01 / (1 + seed))
        with no_fallback(), no_wait(ours) if seed > 1 else warnings.catch_warnings():
            ours.step()
        theirs.step()
        check(ours, theirs)
    assert ours._modes.kernels.compilations == 1


def test_state_that_is_loaded_and_counts_that_a_user_sets(device: str) -> None:
    ours, theirs = twins(maker("AdamW", capturable=True), device, nonfinite="skip")
    for seed in range(8):
        give((ours, theirs), seed)
        for opt in (ours, theirs):
            if seed == 3:  # of some parameters alone: from here on there are two buckets
                opt.state[all_params(opt)[1]]["step"] += 5
            if seed == 5:
                opt.load_state_dict(opt.state_dict())
        with no_fallback():
            ours.step()
        theirs.step()
        check(ours, theirs)
    assert len(ours._modes.kernels._works) == 2
    plain = maker("AdamW")(clone_params(all_params(ours)))  # counts on the host, without a wrapper
    plain.load_state_dict({**ours.state_dict(), "param_groups": plain.state_dict()["param_groups"]})
    set_grads(all_params(plain), 1)
    plain.step()


def test_no_elements_and_gradients_that_come_and_go(device: str) -> None:
    def make(params: Any) -> Optimizer:
        empty = [nn.Parameter(torch.zeros(0, 3, device=device)) for _ in range(3)]
        groups = [{"params": params}, {"params": empty}]
        return AdamW(groups, lr=0.01, foreach=False, capturable=True)

    ours, theirs = twins(make, device)
    for seed in range(5):
        give((ours, theirs), seed)
        if seed in (1, 3):
            for opt in (ours, theirs):
                all_params(opt)[seed].grad = None
        with no_fallback():
            ours.step()
        theirs.step()
        check(ours, theirs)


def test_many_tensors(device: str) -> None:
    """More than one Triton program stores step counts, and than one launch takes addresses."""
    count = 1030
    params = [nn.Parameter(torch.ones(1, device=device)) for _ in range(count)]
    opt = compileclip.wrap(maker("AdamW", capturable=True)(params), 1.0, mode="multi_tensor")
    for step in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        with no_fallback():
            opt.step()
        steps = torch.stack([opt.state[p]["step"] for p in params])
        assert torch.equal(steps.cpu(), torch.full((count,), step + 1.0))
    assert all(torch.equal(p, params[0]) for p in params)


@pytest.mark.parametrize("write_grads", [None, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_grad_scaler(name: str, write_grads: bool | None, device: str) -> None:
    """Scale and overflow go to the kernels, and gradients are read as they are."""
    ours, theirs = twins(maker(name), device, write_grads=write_grads)
    scale, finite = (torch.tensor(v, device=device) for v in (1024.0, 0.0))
    for seed in range(7):
        give((ours, theirs), seed)
        overflow = seed in (0, 3)
        for p in all_params(ours):
            p.grad.mul_(math.inf if overflow else scale)
        ours.grad_scale, ours.found_inf = scale, finite + overflow
        with no_fallback():
            if seed > 3 and name != "Adagrad":
                with no_wait(ours):
                    ours.step()
            else:
                ours.step()
        if overflow:
            continue
        theirs.step()
        check(ours, theirs)
        if write_grads:
            for a, b in zip(grads_of(ours), grads_of(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=1.2e-7, atol=0)
    assert ours._modes.kernels.decides == (name != "Adagrad")


def test_what_is_captured_reads_nothing_of_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that can be seen without a CUDA graph: no copies, no counts, no decisions."""
    from compileclip.lowering import triton

    ours, theirs = twins(maker("AdamW", capturable=True), device, nonfinite="skip")
    for seed in range(2):
        give((ours, theirs), seed)
        ours.step()
        theirs.step()
    give((ours, theirs), 2)
    with no_fallback(), no_wait(ours), pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
        patch.setattr(triton, "pinned", None)
        ours.step()
    theirs.step()
    check(ours, theirs)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (maker("AdamW"), {}, "would repeat this step's count"),
        (maker("AdamW", capturable=True), {"nonfinite": "raise"}, 'nonfinite="raise" cannot be'),
        (maker("AdamW", capturable=True), {"max_norm": None}, "another than all before it"),
    ],
    ids=["counts on the host", "raise", "another program"],
)
def test_what_cannot_be_captured_is_eager_for_now(
    make: Any, options: dict[str, Any], reason: str, device: str
) -> None:
    bound = options.pop("max_norm", 1.0)
    ours, theirs = twins(make, device, **options)
    for seed in range(4):
        give((ours, theirs), seed)
        with pytest.MonkeyPatch.context() as patch:
            if seed == 2:
                ours.max_norm = theirs.max_norm = bound
                patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
            ours.step()
        theirs.step()
        check(ours, theirs)
        expected = reason if seed == 2 else None
        why = ours._modes.kernels.why_not
        assert (why is None) if expected is None else (expected in why[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW", "RAdam", "SGD"])
@pytest.mark.parametrize("tensors", [4, 100])
def test_capture_and_replay(name: str, tensors: int) -> None:
    """A captured step goes on counting, clips to the norm of each replay, and skips by itself."""
    options = {} if name == "SGD" else {"capturable": True}
    params = [nn.Parameter(p.detach().cuda()) for p in params_like([(37, 5)] * tensors)]
    ours = compileclip.wrap(
        maker(name, **options)(params), 1.0, mode="multi_tensor", nonfinite="skip"
    )
    theirs = compileclip.wrap(
        maker(name, **options)(clone_params(params)), 1.0, mode="multi_tensor", nonfinite="skip"
    )
    fixed = [torch.zeros_like(p) for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_fallback():
        for seed in range(3):
            give((ours, theirs), seed)
            ours.step()
            theirs.step()
    torch.cuda.current_stream().wait_stream(stream)
    for p, g in zip(params, fixed, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_fallback():
        ours.step()
    for seed in range(3, 9):
        give((theirs,), seed, math.nan if seed == 5 else None)
        for g, p in zip(fixed, all_params(theirs), strict=True):
            g.copy_(p.grad)
        if seed == 7:
            ours.max_norm = theirs.max_norm = 0.25
        graph.replay()
        theirs.step()
        assert same(ours.total_norm, theirs.total_norm)
        for a, b in zip(all_params(ours), all_params(theirs), strict=True):
            assert same(a, b)
    for (_, a), (_, b) in zip(flat_state(ours), flat_state(theirs), strict=True):
        assert same(a, b)


@pytest.mark.gpu
def test_three_kernels_where_the_device_decides() -> None:
    ours, theirs = twins(maker("AdamW", capturable=True), "cuda", nonfinite="skip")
    for seed in range(3):
        give((ours, theirs), seed)
        ours.step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ours.step()
        torch.cuda.synchronize()
    launches = [e for e in profile.key_averages() if "LaunchKernel" in e.key]
    assert sum(e.count for e in launches) == 3, launches


def test_in_the_interpreter() -> None:
    """The tests above."""
    assert passed_in_the_interpreter(__file__) >= 30
