"""What happens to an optimizer between and around steps, where ranks hold parts."""

from __future__ import annotations

import copy
import math
import os
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import Spot, Twins, check_same_bits, whole
from rank_pool import RankPool
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import compileclip
from compileclip.distributed.shards import local

SPOTS = [Spot((7, 3), (2,), "S0"), Spot((4,), (2,), "S0"), Spot((3, 5), (2,), "R"), Spot((5,))]


def adamw(params: Any) -> Optimizer:
    return AdamW(params, lr=0.1)


def both(twins: Twins) -> Any:
    return (twins.ours, twins.parts), (twins.theirs, twins.wholes)


def check_changes() -> None:
    twins = Twins(SPOTS, adamw)
    torch.manual_seed(5)
    late = [Spot((6, 2), (2,), "S1"), Spot((2,))]
    full = [torch.randn(s.shape) for s in late]
    for step in range(14):
        if step == 2:  # a checkpoint of an earlier step
            saved = [copy.deepcopy(opt.state_dict()) for opt, _ in both(twins)]
        elif step == 4:
            for (opt, _), state in zip(both(twins), saved, strict=True):
                opt.load_state_dict(state)
        elif step == 6:  # new parameters
            for (opt, params), sharded in zip(both(twins), (True, False), strict=True):
                more = [
                    nn.Parameter(s.hold(t) if sharded else t.clone())
                    for s, t in zip(late, full, strict=True)
                ]
                params += more
                opt.add_param_group({"params": more, "lr": 0.05})
            twins.spots += late
        elif step == 8:  # numbers written by hand
            for opt, params in both(twins):
                opt.state[params[0]]["step"].fill_(3)
                opt.state[params[1]]["exp_avg"].mul_(0.5)
        elif step == 10:  # state that is gone
            for opt, params in both(twins):
                del opt.state[params[1]]
        twins.set_grads(step)
        if step in (5, 12):  # nobody has a gradient of one
            for _, params in both(twins):
                params[step % 3].grad = None
        twins.ours.step()
        twins.theirs.step()
        twins.check()
        assert twins.ours._modes.kernels.refusal is None  # though it plans no more, after so many


def test_changes_between_steps(on_ranks: Any) -> None:
    on_ranks(2, check_changes)


def check_left() -> None:
    """Nothing is kept of gradients, and autograd hears of what was written."""
    twins = Twins(SPOTS, adamw)
    for step in range(3):
        twins.set_grads(step)
        saved = (twins.parts[0] * twins.parts[0]).sum()
        kept = [weakref.ref(local(p.grad)) for p in twins.parts if p.grad is not None]
        twins.ours.step()
        twins.ours.zero_grad()
        assert not any(ref() is not None for ref in kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()
    assert twins.ours._modes.kernels.why_not is None


def test_what_a_step_leaves(on_ranks: Any) -> None:
    on_ranks(2, check_left)


def check_scaler(fused: bool, nonfinite: str) -> None:
    twins = Twins(SPOTS[:2], lambda p: AdamW(p, lr=0.1, fused=fused), nonfinite=nonfinite)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for step in range(4):
        twins.set_grads(step, poison=math.inf if step == 2 else None)
        for (opt, params), scaler in zip(both(twins), scalers, strict=True):
            for p in params:
                p.grad = p.grad * scaler.get_scale()
            scaler.scale(torch.zeros(()))
            scaler.step(opt)
            scaler.update()
        if step != 2 or nonfinite == "skip":
            twins.check()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    step = twins.ours.state[twins.parts[0]]["step"]
    assert step == 3


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(on_ranks: Any, fused: bool, nonfinite: str) -> None:
    on_ranks(2, check_scaler, fused, nonfinite)


def check_explained() -> str:
    spots = [Spot((4, 6), (2, 2), "S0 S1"), Spot((9,), (2, 2), "S0 R"), Spot((3,))]
    twins = Twins(spots, adamw)
    twins.step(0)
    text: str = twins.ours.explain()
    return text


def test_explain(on_ranks: Any) -> None:
    text = on_ranks(4, check_explained)[0]
    assert "1 parameter on mesh ('a', 'b')(2, 2), of which 2 ranks each hold the same" in text
    assert "1 parameter plain" in text
    assert "one all-reduce of 16 bytes over the group of ranks (0, 1, 2, 3)" in text
    assert "why eager" not in text


def check_traced() -> None:
    """A compiled step leaves its graph, for a process group too, and says why."""
    p = nn.Parameter(torch.ones(3))
    opt = compileclip.wrap(SGD([p], lr=1.0), 1.0, process_group=dist.group.WORLD)

    def train(x: Tensor) -> Tensor:
        loss = (p * x).sum()
        loss.backward()
        opt.step()
        return loss

    torch.compile(train, backend="eager")(torch.ones(3) * (1 + dist.get_rank()))
    assert opt.total_norm is not None
    torch.testing.assert_close(opt.total_norm.item(), math.sqrt(3 + 12))
    check_same_bits(opt.total_norm)
    with pytest.raises(Exception, match="ranks hold parts of the parameters"):
        torch.compile(lambda: opt.step(), backend="eager", fullgraph=True)()


def test_a_compiled_function(on_ranks: Any) -> None:
    on_ranks(2, check_traced)


def check_dying() -> None:
    twins = Twins(SPOTS[:2], adamw)
    twins.step(0)
    before = [whole(p.detach()).clone() for p in twins.parts]
    held = copy.deepcopy(twins.ours.state_dict()["state"])
    twins.set_grads(1)
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(3)
    with pytest.raises(RuntimeError):
        twins.ours.step()
    for p, q in zip(twins.parts, before, strict=True):
        part: Any = p
        assert torch.equal(part.to_local(), q.chunk(2)[0])
    for index, state in twins.ours.state_dict()["state"].items():
        assert state["step"] == held[index]["step"]
        assert torch.equal(state["exp_avg"].to_local(), held[index]["exp_avg"].to_local())


def test_a_rank_that_dies() -> None:
    pool = RankPool(2)
    with pytest.raises(AssertionError, match="rank 1: EOFError") as error:
        pool.run(check_dying)
    assert "rank 0" not in str(error.value)
