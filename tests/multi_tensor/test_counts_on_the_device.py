"""Step counts that stay on a GPU, and steps that it decides on: ``capturable=True``, "skip", AMP.

On a GPU, or in Triton's interpreter on the CPU.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from helpers import clone_params, compilations, set_grads
from optimizer_registry import OPTIMIZERS
from test_optim_db import all_params, grads_of
from torch import nn
from torch.optim import AdamW, Optimizer

import compileclip

pytest.importorskip("triton")
from device_steps import CAPTURABLE, check, give, maker, no_fallback, no_wait, on_the_device, twins
from triton_runs import device, passed_in_the_interpreter

__all__ = ["device", "on_the_device"]  # fixtures


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CAPTURABLE)
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
    assert compilations(kernels) == 1
    assert kernels.decides
    assert "waits for the norm" not in ours.explain()
    steps = [state["step"].item() for state in ours.state.values()]
    assert steps == [7] * len(steps)


@pytest.mark.parametrize(
    "name", ["AdamW", "RAdam", "SGD, maximize", "SGD, Nesterov", "Adagrad, decay"]
)
def test_skip_without_capturable(name: str, device: str) -> None:
    """Counts go to the device where they can; where there are none, a kernel decides as well."""
    decides = OPTIMIZERS[name].decides
    lr = 0.01 if OPTIMIZERS[name].capturable else 0.1
    ours, theirs = twins(maker(name, lr=lr), device, nonfinite="skip")
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
    assert compilations(kernels) == 1
    ours.max_norm = 7.5  # as a captured step is to see it
    (place,) = kernels._places.values()
    assert place.max_norm.item() == 7.5


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
    assert compilations(ours._modes.kernels) == 1


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


def test_a_copy_of_the_optimizer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lacks the mark by which torch, on a GPU, warns once that nothing is captured."""

    def warns(opt: Optimizer) -> None:
        if not getattr(opt, "_warned_capturable_if_run_uncaptured", False):
            opt._warned_capturable_if_run_uncaptured = True

    monkeypatch.setattr(Optimizer, "_accelerator_graph_capture_health_check", warns)
    ours, theirs = twins(maker("AdamW", capturable=True), device)
    ours = copy.deepcopy(ours)
    for seed in range(3):
        give((ours, theirs), seed)
        with no_fallback():
            ours.step()
        theirs.step()
        check(ours, theirs)


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
            if seed > 3 and OPTIMIZERS[name].decides:
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
    assert ours._modes.kernels.decides == OPTIMIZERS[name].decides


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
