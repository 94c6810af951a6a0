"""Steps of parameters that ranks hold parts of, against one process with whole parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import Spot, Twins
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop, Rprop

F32 = torch.float32
# By name: how many ranks, and the parameters.
MODELS = {
    "FSDP2": (2, [Spot((8, 3), (2,), "S0"), Spot((6,), (2,), "S0"), Spot((4, 4), (2,), "S0")]),
    "uneven": (2, [Spot((7, 3), (2,), "S0"), Spot((1,), (2,), "S0"), Spot((3, 5), (2,), "S0")]),
    "empty": (4, [Spot((3, 2), (4,), "S0"), Spot((1,), (4,), "S0"), Spot((2,), (4,), "S0")]),
    "TP": (2, [Spot((4, 6), (2,), "S0"), Spot((4, 6), (2,), "S1"), Spot((5,), (2,), "R")]),
    "TP and plain": (2, [Spot((4, 6), (2,), "S0"), Spot((7,)), Spot((5,), (2,), "R")]),
    "FSDP2 + TP": (
        4,
        [Spot((4, 6), (2, 2), "S0 S1"), Spot((9,), (2, 2), "S0 R"), Spot((7, 5), (2, 2), "S0 S0")],
    ),
    "HSDP": (4, [Spot((5, 3), (2, 2), "R S0"), Spot((8,), (2, 2), "R S0")]),
    "two meshes": (
        4,
        [
            Spot((6, 3), (4,), "S0"),
            Spot((4, 4), (2, 2), "S0 R"),
            Spot((5,), (2, 2, "b"), "S0"),
            Spot((3,)),
        ],
    ),
    "a rank without": (
        2,
        [Spot((6, 3), (2,), "S0", absent=(1,)), Spot((4, 4), (2,), "S0"), Spot((5,), (2,), "R")],
    ),
    "nobody has": (2, [Spot((6, 3), (2,), "S0", absent=(0, 1)), Spot((4,), (2,), "S0")]),
    "0-dim": (2, [Spot((), (2,), "R"), Spot((4, 3), (2,), "S0")]),
}
OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda p: AdamW(p, lr=0.1),
    "AdamW fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "Adam amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD": lambda p: SGD(p, lr=0.1),
    "NAdam": lambda p: NAdam(p, lr=0.1),
    "RAdam": lambda p: RAdam(p, lr=0.1),
    "Adagrad": lambda p: Adagrad(p, lr=0.1),
    "RMSprop centered": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "Rprop": lambda p: Rprop(p, lr=0.01),
}

# rtol and atol where another unit of the norm, or another rounding, grows. Observed: 3.3e-6 apart
# in mode inductor, which contracts; in RMSprop's small denominators 1e-5 of the value.
CLOSE = {"inductor": (1e-5, 1e-5), "RMSprop centered": (1e-4, 1e-6)}


def check_model(model: str, name: str, settings: dict[str, Any], steps: int = 7) -> None:
    mode = settings.get("mode", "auto")
    twins = Twins(MODELS[model][1], OPTIMIZERS[name], **settings)
    for step in range(steps):
        if step == 3:
            twins.ours.max_norm = twins.theirs.max_norm = 1e6  # nothing is clipped
        if step == 5:
            twins.ours.max_norm = twins.theirs.max_norm = 0.1
            for opt in (twins.ours, twins.theirs):
                opt.param_groups[0]["lr"] = 0.02
        twins.step(step)
        twins.check(*CLOSE.get(name if mode != "inductor" else mode, (1e-6, 1e-7)))
    assert twins.ours.total_norm is not None
    assert twins.ours.total_norm > 0.1
    has_kernels = mode in ("auto", "multi_tensor") and model != "0-dim"
    kernels = twins.ours._modes.kernels
    if has_kernels:
        assert kernels.why_not is None
        assert all(kernels.serves_one(v) for v in _views(twins))


def _views(twins: Twins) -> list[Any]:
    local = twins.ours._modes.over_ranks.ranks.local
    return [local.view(p) for p in twins.parts if p.grad is not None]


@pytest.mark.parametrize("model", MODELS)
def test_models(on_ranks: Any, model: str) -> None:
    on_ranks(MODELS[model][0], check_model, model, "AdamW", {})


@pytest.mark.parametrize("model", MODELS)
def test_eager(on_ranks: Any, model: str) -> None:
    on_ranks(MODELS[model][0], check_model, model, "AdamW", {"mode": "eager"})


@pytest.mark.parametrize("model", ["uneven", "TP and plain", "a rank without"])
def test_inductor(on_ranks: Any, model: str) -> None:
    on_ranks(2, check_model, model, "AdamW", {"mode": "inductor"})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["uneven", "TP and plain"])
def test_optimizers(on_ranks: Any, model: str, name: str) -> None:
    on_ranks(2, check_model, model, name, {"mode": "multi_tensor"})


def check_grads(write_grads: bool | None, mode: str) -> None:
    twins = Twins(
        MODELS["TP and plain"][1], OPTIMIZERS["AdamW"], write_grads=write_grads, mode=mode
    )
    for step in range(3):
        twins.set_grads(step)
        before = [p.grad.clone() for p in twins.parts]
        twins.ours.step()
        twins.theirs.step()
        twins.check()
        for p, q, held in zip(twins.parts, twins.wholes, before, strict=True):
            if write_grads is False:
                assert torch.equal(local(p.grad), local(held))
            elif write_grads:
                torch.testing.assert_close(whole_of(p.grad), q.grad, rtol=1e-6, atol=0)


def local(t: Any) -> Any:
    return t.to_local() if hasattr(t, "to_local") else t


def whole_of(t: Any) -> Any:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@pytest.mark.parametrize("mode", ["auto", "eager"])
@pytest.mark.parametrize("write_grads", [None, True, False])
def test_gradients(on_ranks: Any, write_grads: bool | None, mode: str) -> None:
    on_ranks(2, check_grads, write_grads, mode)


def check_nonfinite(nonfinite: str, mode: str, poison: float) -> None:
    twins = Twins(MODELS["FSDP2"][1], OPTIMIZERS["AdamW"], nonfinite=nonfinite, mode=mode)
    twins.step(0)
    twins.check()
    if nonfinite == "raise":
        before = [local(p).clone() for p in twins.parts]
        for opt in (twins.ours, twins.theirs):
            twins.set_grads(1, poison)  # on the last rank
            with pytest.raises(RuntimeError, match="non-finite"):
                opt.step()
        assert all(torch.equal(local(p), q) for p, q in zip(twins.parts, before, strict=True))
    else:
        twins.step(1, poison=poison)
        twins.check()
    if nonfinite != "propagate":
        twins.step(2)
        twins.check()
        assert twins.ours.state[twins.parts[0]]["step"] == 2


@pytest.mark.parametrize("mode", ["auto", "eager"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_nonfinite(on_ranks: Any, nonfinite: str, mode: str, poison: float) -> None:
    on_ranks(2, check_nonfinite, nonfinite, mode, poison)


def check_dtype(dtype: torch.dtype) -> None:
    twins = Twins(MODELS["uneven"][1], OPTIMIZERS["AdamW"], dtype=dtype)
    # Half precision: eager rounds at each operation, the kernel once; observed 3.9e-3 and 4.9e-4.
    rtol = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-14}[dtype]
    for step in range(4):
        twins.step(step)
        twins.check(rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(on_ranks: Any, dtype: torch.dtype) -> None:
    on_ranks(2, check_dtype, dtype)


def check_norms(order: float, world: int) -> None:
    spots = MODELS["two meshes" if world == 4 else "TP and plain"][1]
    twins = Twins(spots, OPTIMIZERS["SGD"], norm_type=order)
    for step in range(2):
        twins.step(step)
        norm, expected = twins.ours.total_norm, twins.theirs.total_norm
        # Observed: 1.2e-7.
        torch.testing.assert_close(norm, expected, rtol=2.4e-7, atol=0.0)
    twins.set_grads(3, poison=math.nan)
    twins.ours.step()
    assert twins.ours.total_norm is not None
    assert twins.ours.total_norm.isnan() or order == 0
    assert dist.get_world_size() == world


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, 0.5, math.inf, -math.inf, -1.0, 0.0, 20.0])
def test_orders(on_ranks: Any, order: float, world: int) -> None:
    on_ranks(world, check_norms, order, world)
