"""GradScaler with the wrapper, which it treats as the bare optimizer unless told otherwise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer
from runs import MAX_NORM, Run, adamw

import compileclip

OVERFLOWS = (2, 5)  # steps whose loss is infinite


def train(run: Run, unscale: bool, steps: int = 10) -> list[float]:
    """Train under a GradScaler, as PyTorch's AMP recipe does, and return the scales."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for step in range(steps):
        loss = run.loss(step) * (math.inf if step in OVERFLOWS else 1.0)
        scaler.scale(loss).backward()
        if unscale or not run.wrapped:
            scaler.unscale_(run.optimizer)
        if not run.wrapped:
            params = [p for g in run.optimizer.param_groups for p in g["params"]]
            norm = compileclip.clip_grad_norm_(params, MAX_NORM)
            run.norms.append(norm)
        scaler.step(run.optimizer)
        scaler.update()
        if isinstance(run.optimizer, compileclip.ClippedOptimizer) and step not in OVERFLOWS:
            assert run.optimizer.total_norm is not None
            run.norms.append(run.optimizer.total_norm)
        run.optimizer.zero_grad()
        scales.append(scaler.get_scale())
    if not run.wrapped:
        run.norms = [n for i, n in enumerate(run.norms) if i not in OVERFLOWS]
    return scales


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool, write_grads: bool | None) -> None:
    ours, theirs = Run(True, write_grads=write_grads), Run(False)
    assert train(ours, unscale) == train(theirs, unscale)
    assert_same_optimizer(ours.optimizer, theirs.optimizer)
    assert_same(ours.norms, theirs.norms, "norm")


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_and_kernels(unscale: bool, write_grads: bool | None, nonfinite: str) -> None:
    """With "skip" the kernels take the scale out; to the bit, for a scale is a power of two."""

    def make(params: Any) -> Any:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False)

    options = {"mode": "multi_tensor", "write_grads": write_grads, "nonfinite": nonfinite}
    ours, theirs = Run(True, make, **options), Run(False, make)
    with warnings.catch_warnings():
        warnings.simplefilter("error", compileclip.FallbackWarning)
        assert train(ours, unscale) == train(theirs, unscale)
    assert_same_optimizer(ours.optimizer, theirs.optimizer)
    assert_same(ours.norms, theirs.norms, "norm")


def test_grad_scaler_and_no_bound() -> None:
    def make(params: Any) -> Any:
        return torch.optim.SGD(params, lr=0.1, foreach=False)

    ours, theirs = Run(True, make, mode="multi_tensor"), Run(False, make)
    for run in (ours, theirs):
        run.loss(0).backward()
    ours.optimizer.max_norm = None
    for p in ours.model.parameters():
        if p.grad is not None:
            p.grad.mul_(64)
    ours.optimizer.grad_scale, ours.optimizer.found_inf = torch.tensor(64.0), torch.tensor(0.0)
    ours.optimizer.step()
    theirs.optimizer.step()
    assert_same_optimizer(ours.optimizer, theirs.optimizer)


@pytest.mark.parametrize("nonfinite", ["propagate", "raise", "skip"])
@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_scaler_over_fused(
    dtype: torch.dtype, unscale: bool, write_grads: bool | None, nonfinite: str
) -> None:
    def make(params: Any) -> Any:
        return adamw(params, fused=True)

    ours, theirs = Run(True, make, write_grads=write_grads, nonfinite=nonfinite), Run(False, make)
    for run in (ours, theirs):
        run.model.to(dtype)
        run.loss = lambda step, run=run: Run.loss(run, step)  # type: ignore[method-assign]
    torch.set_default_dtype(dtype)
    try:
        assert train(ours, unscale) == train(theirs, unscale)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not hasattr(ours.optimizer, "grad_scale")
    assert not hasattr(ours.optimizer, "found_inf")
    # The scale is a power of two, so unscaling is exact; the clip divides. Observed: 5e-7.
    for a, b in zip(ours.norms, theirs.norms, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-5)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    steps = [s["step"].item() for s in ours.optimizer.state.values()]
    assert steps == [10 - len(OVERFLOWS)] * len(steps)


def test_raise_leaves_overflows_to_the_scaler_but_not_bad_gradients() -> None:
    run = Run(True, lambda p: adamw(p, fused=True), nonfinite="raise")
    train(run, unscale=False)  # overflows, and no error
    run.loss(0).backward()
    next(run.model.parameters()).grad.fill_(math.nan)
    with pytest.raises(RuntimeError, match="non-finite"):
        run.optimizer.step()


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_with_a_compiled_step(unscale: bool) -> None:
    """The scaler unscales by itself, so the step that is compiled sees true gradients."""
    ours, theirs = Run(True, mode="inductor"), Run(False)
    assert train(ours, unscale) == train(theirs, unscale)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Counted:
    """How often a GradScaler calls an optimizer's step, seen as trainers do and by a hook."""

    def __init__(self, optimizer: Any) -> None:
        self.calls = self.hooks = 0
        step = optimizer.step

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return step(*args, **kwargs)

        optimizer.step = counted
        optimizer.register_step_post_hook(self._hook)

    def _hook(self, *args: Any) -> None:
        self.hooks += 1


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize("mode", ["eager", "auto", "multi_tensor"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_called_as_that_of_the_bare_optimizer(
    fused: bool, mode: str, nonfinite: str, unscale: bool
) -> None:
    def make(params: Any) -> Any:
        return adamw(params, fused=fused)

    counts = []
    for run in (Run(True, make, mode=mode, nonfinite=nonfinite), Run(False, make)):
        counted = Counted(run.optimizer)
        train(run, unscale)
        counts.append((counted.calls, counted.hooks))
    assert counts == [(10 if fused else 10 - len(OVERFLOWS),) * 2] * 2


def half_fused(params: list[Any]) -> Any:
    groups: list[dict[str, Any]] = [{"params": params[:1], "fused": True}, {"params": params[1:]}]
    return torch.optim.SGD(groups, lr=0.1)


class Unscaling(torch.optim.SGD):
    """Says that its step unscales, as optimizers of other packages do."""

    _step_supports_amp_scaling = True


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (adamw, {}, False),
        (adamw, {"nonfinite": "raise"}, False),
        (adamw, {"nonfinite": "skip"}, True),
        (adamw, {"nonfinite": "skip", "mode": "inductor"}, False),
        (lambda p: adamw(p, fused=True), {}, True),
        (lambda p: adamw(p, fused=True), {"mode": "inductor"}, False),
        (lambda p: adamw(p, capturable=True), {}, True),
        (half_fused, {}, False),
        (lambda p: Unscaling(p, lr=0.1), {}, True),
    ],
)
def test_what_a_scaler_is_told(make: Any, options: dict[str, Any], expected: bool) -> None:
    run = Run(True, make, **options)
    assert run.optimizer._step_supports_amp_scaling is expected


def test_a_first_step_that_overflows_is_not_one_for_schedulers() -> None:
    warned = []
    for wrapped in (True, False):
        run = Run(wrapped, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(run.loss(0) * math.inf).backward()
        scaler.step(run.optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.scheduler.step()
        warned.append([str(w.message) for w in caught])
    assert warned[0] == warned[1]
    assert "before `optimizer.step()`" in warned[0][0]
