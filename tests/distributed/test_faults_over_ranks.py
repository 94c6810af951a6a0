"""Changes of groups, stages and dtypes that were once missed, where ranks hold parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import Spot, Twins, mesh
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer

import compileclip

SPOTS = [Spot((7, 3), (2,), "S0"), Spot((4,), (2,), "S0"), Spot((3, 5), (2,), "R"), Spot((5,))]


def two_groups(params: Any) -> Optimizer:
    return AdamW([{"params": list(params[:2])}, {"params": list(params[2:]), "lr": 0.01}], lr=0.1)


def check_groups() -> None:
    twins = Twins(SPOTS, two_groups)
    for step in range(6):
        for opt in (twins.ours, twins.theirs):
            if step == 2:  # to the next group, which leaves the parameters in their order
                opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
            elif step == 4:
                opt.add_param_group({"params": []})
        twins.step(step)
        twins.check()


def test_groups_that_change(on_ranks: Any) -> None:
    on_ranks(2, check_groups)


def check_grad_dtypes() -> None:
    full = torch.ones(6, 3)
    param = nn.Parameter(distribute_tensor(full.clone(), mesh(2), [Shard(0)]))
    param.grad_dtype = None
    opt = compileclip.wrap(SGD([param], lr=0.1), None)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        param.grad = distribute_tensor(full.to(dtype), mesh(2), [Shard(0)])
        opt.step()
    whole: Any = param.detach()
    torch.testing.assert_close(whole.full_tensor(), full * 0.6)


def test_gradients_of_changing_dtypes(on_ranks: Any) -> None:
    on_ranks(2, check_grad_dtypes)


def check_stages(dtypes: tuple[torch.dtype | None, ...], norm_type: float) -> None:
    dtype = dtypes[dist.get_rank()]
    params: list[Tensor] = [] if dtype is None else [nn.Parameter(torch.ones(4, dtype=dtype))]
    world = dist.group.WORLD
    opt = compileclip.wrap(
        SGD([{"params": params}], lr=0.1), 1.0, norm_type=norm_type, process_group=world
    )
    number = 4 * sum(d is not None for d in dtypes)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        assert opt.total_norm is not None
        assert abs(opt.total_norm.item() - number ** (1 / norm_type)) < 1e-6
    for p in params:
        p.grad = torch.ones_like(p)
    norm = compileclip.clip_grad_norm_(params, 9.0, norm_type, process_group=world)
    assert abs(norm.item() - number ** (1 / norm_type)) < 1e-6


@pytest.mark.parametrize(
    ("dtypes", "norm_type"),
    [
        ((None, torch.float32), 2.0),
        ((None, torch.float64), 2.0),
        ((torch.float64, torch.float32), 2.0),
        ((torch.float32, torch.float16), 8.0),
    ],
)
def test_stages_of_other_dtypes(on_ranks: Any, dtypes: Any, norm_type: float) -> None:
    on_ranks(2, check_stages, dtypes, norm_type, seconds=20)


def check_one_rank() -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    param = nn.Parameter(torch.ones(4))
    param._fsdp_flattened = True  # type: ignore[attr-defined]
    opt = compileclip.wrap(SGD([param], lr=0.1), 1.0, process_group=groups[dist.get_rank()])
    param.grad = torch.ones(4)
    opt.step()
    assert opt.total_norm is not None
    assert opt.total_norm.item() == 2.0


def test_a_group_of_one_rank(on_ranks: Any) -> None:
    on_ranks(2, check_one_rank)


def check_raising() -> None:
    """A step that raises, on state that was just loaded, and those after it."""
    twins = Twins(SPOTS, lambda p: AdamW(p, lr=0.1), nonfinite="raise")
    for step in range(5):
        if step == 2:
            for opt in (twins.ours, twins.theirs):
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                twins.set_grads(step, poison=float("nan"))
                with pytest.raises(RuntimeError, match="non-finite"):
                    opt.step()
        twins.step(step)
        twins.check()
        assert twins.ours.state[twins.parts[0]]["step"] == step + 1


def test_a_step_that_raises(on_ranks: Any) -> None:
    on_ranks(2, check_raising)
