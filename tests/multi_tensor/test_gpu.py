"""On a CUDA device: the same results, no synchronization, few kernels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer, params_like, same, set_grads
from optimizer_registry import OPTIMIZERS, maker, makers
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import compileclip

pytestmark = pytest.mark.gpu

SHAPES = [(64, 33), (7,), (), (1000, 130), (5, 4, 3)]
# torch 2.11 has no CUDA kernel for Adagrad.
FUSED = makers(
    [n for n in ("AdamW", "SGD, momentum", "Adagrad") if OPTIMIZERS[n].is_fused_on("cuda")],
    lr=0.01,
    fused=True,
)
FOR_LOOP = {
    f"{name}, for-loop": maker(name, lr=0.01, foreach=False)
    for name in ("AdamW", "SGD, momentum", "RMSprop")
}
MAKERS = {
    **makers(["AdamW", "SGD, momentum"], lr=0.01),
    **makers(["Adam"], lr=0.01, capturable=True),
    **FOR_LOOP,
    **FUSED,
}


def cuda_params(dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(0)
    return [nn.Parameter(p.detach().cuda()) for p in params_like(SHAPES, dtype)]


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 4.0, math.inf, -1.0, -math.inf, 0.0])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
)
def test_norm_is_that_of_the_cpu(dtype: torch.dtype, norm_type: float) -> None:
    grads = [torch.randn(s, dtype=torch.complex128).to(dtype) for s in SHAPES]
    on_cpu = compileclip.get_total_norm(grads, norm_type)
    on_gpu = compileclip.get_total_norm([g.cuda() for g in grads], norm_type)
    assert on_gpu.is_cuda
    assert on_gpu.dtype == on_cpu.dtype
    rel = 1e-13 if dtype == torch.float64 else 1.2e-7  # one unit in the last place of float32
    assert on_gpu.item() == pytest.approx(on_cpu.item(), rel=rel)
    again = compileclip.get_total_norm([g.cuda() for g in grads], norm_type)
    assert torch.equal(on_gpu, again)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float32, 1e-30), (torch.float64, 1e300)],
)
def test_no_overflow_and_no_underflow(dtype: torch.dtype, size: float) -> None:
    grads = [torch.full((4,), size, dtype=dtype, device="cuda")]
    expected = 2 * grads[0][0].double().item()
    assert compileclip.get_total_norm(grads).item() == pytest.approx(expected, rel=1.2e-7)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_is_applied_in_float32_and_rounded_once(
    dtype: torch.dtype, foreach: bool | None
) -> None:
    params = cuda_params(dtype)
    set_grads(params, seed=1)
    grads = [p.grad.clone() for p in params]
    norm = compileclip.clip_grad_norm_(params, 0.3, foreach=foreach)
    coef = torch.clamp(0.3 / (norm + 1e-6), max=1.0)
    expected = [(g.float() * coef).to(dtype) for g in grads]
    assert_same([p.grad for p in params], expected, "gradient")


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_wrapped_against_clip_and_step(name: str, write_grads: bool | None) -> None:
    """Kernels round as torch's for-loop does; its foreach and fused kernels round otherwise."""
    ours = compileclip.wrap(MAKERS[name](cuda_params()), 1.0, write_grads=write_grads)
    theirs = MAKERS[name](cuda_params())
    for step in range(6):
        ours.max_norm = max_norm = 1e4 if step in (1, 2) else 0.1
        for opt in (ours, theirs):
            set_grads(opt.param_groups[0]["params"], step)
        norm = compileclip.clip_grad_norm_(theirs.param_groups[0]["params"], max_norm)
        ours.step()
        theirs.step()
        assert ours.total_norm is not None
        assert torch.equal(ours.total_norm, norm)
        if write_grads:
            pairs = zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True)
            # That of the 0-dim parameter, which eager steps, a fused kernel divides.
            assert all(same(a.grad, b.grad) for a, b in pairs if a.dim())
    if name in FOR_LOOP:
        assert_same_optimizer(ours, theirs)
    else:
        pairs = zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    text = ours.explain()
    assert "multi_tensor" in text
    assert "1 parameter, one of shape (): a parameter is 0-dim" in text


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_without_a_sync(name: str, bad: float) -> None:
    opt = compileclip.wrap(MAKERS[name](cuda_params()), 0.1, nonfinite="skip")
    params = opt.param_groups[0]["params"]
    set_grads(params, 0)
    opt.step()  # the first step makes the state, and may wait
    before = copy.deepcopy(opt)
    set_grads(params, 1)
    params[1].grad[0] = bad
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_optimizer(opt, before)
    assert opt.total_norm is not None
    assert not opt.total_norm.isfinite()


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_no_synchronization_in_a_step(name: str, write_grads: bool | None) -> None:
    opt = compileclip.wrap(MAKERS[name](cuda_params()), 0.1, write_grads=write_grads)
    params = opt.param_groups[0]["params"]
    for step in range(3):
        set_grads(params, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", ["AdamW, for-loop", "AdamW", "AdamW, fused"])
def test_grad_scaler(name: str, unscale: bool) -> None:
    """The same scaled gradients for both; one overflows, and the scale grows."""

    def run(wrapped: bool) -> tuple[Optimizer, list[float]]:
        opt = MAKERS[name](params := cuda_params())
        opt = compileclip.wrap(opt, 0.5) if wrapped else opt
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12, growth_interval=2)
        scales = []
        for step in range(8):
            scale = scaler.scale(torch.ones((), device="cuda"))
            set_grads(params, step)
            for p in params:
                p.grad.mul_(scale * (math.inf if step == 3 else 1.0))
            if unscale or not wrapped:
                scaler.unscale_(opt)
            if not wrapped:
                compileclip.clip_grad_norm_(params, 0.5)
            scaler.step(opt)
            scaler.update()
            scales.append(scale.item())
        return opt, scales

    (ours, mine), (theirs, other) = run(True), run(False)
    assert mine == other
    assert len(set(mine)) == 2
    # The device may decide, and count: of its counts, powers are taken in float32.
    for a, b in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [None, False])
def test_inductor_against_eager(foreach: bool | None) -> None:
    ours, theirs = (
        compileclip.wrap(AdamW(cuda_params(), lr=0.01, foreach=foreach), 0.1, mode=mode)
        for mode in ("inductor", "eager")
    )
    for step in range(8):
        for opt in (ours, theirs):
            set_grads(opt.param_groups[0]["params"], step)
            opt.max_norm = 0.1 if step % 2 else 1e4
            opt.step()
        assert ours.total_norm is not None
        assert torch.equal(ours.total_norm, theirs.total_norm)
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_whole_training_step_against_eager() -> None:
    def run(compiled: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).cuda()
        opt = compileclip.wrap(AdamW(model.parameters(), lr=0.01), 0.5)

        def train_step(x: Tensor) -> Tensor:
            loss = model(x).square().sum()
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss.detach()

        step = compileclip.compile(train_step) if compiled else train_step
        for i in range(6):
            step(torch.randn(8, 16, generator=torch.Generator().manual_seed(i)).cuda())
            opt.param_groups[0]["lr"] *= 0.9
        assert opt.total_norm is not None
        return [p.detach() for p in model.parameters()], opt.total_norm

    (a, norm_a), (b, norm_b) = run(True), run(False)
    torch.testing.assert_close(norm_a, norm_b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
