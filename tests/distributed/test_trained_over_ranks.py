"""Training with torch's own ways to distribute parameters, against one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import check_same_bits, mesh, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import compileclip

STEPS, BOUND = 4, 0.5


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def batch(part: int, step: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + part))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05)


def parallel(model: nn.Module, tp: Any) -> nn.Module:
    """The two linear layers over ``tp``, each whole again after it; the norm stays plain."""
    plan = {
        "0": ColwiseParallel(output_layouts=Replicate()),
        "3": RowwiseParallel(input_layouts=Replicate()),
    }
    return parallelize_module(model, tp, plan)


def fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    for layer in (model[0], model[2], model[3], model):  # type: ignore[index]
        fully_shard(layer, **options)
    return model


# By name: the ranks, what is made of the model, and how many parts the batch has.
WAYS: dict[str, tuple[int, Callable[[nn.Module], nn.Module], int]] = {
    "FSDP2": (2, fsdp2, 2),
    "FSDP2, 4": (4, fsdp2, 4),
    "FSDP2, kept": (2, lambda m: fsdp2(m, reshard_after_forward=False), 2),
    "HSDP": (4, lambda m: fsdp2(m, mesh=mesh(2, 2)), 4),
    "TP": (2, lambda m: parallel(m, mesh(2)), 1),
    "FSDP2 + TP": (4, lambda m: fsdp2(parallel(m, mesh(2, 2)["b"]), mesh=mesh(2, 2)["a"]), 2),
    "DDP": (2, nn.parallel.DistributedDataParallel, 2),
}


def data_rank(name: str) -> int:
    """Which part of the batch this rank has."""
    rank = dist.get_rank()
    return {"TP": 0, "FSDP2 + TP": rank // 2}.get(name, rank)


def check_way(name: str, accumulate: int = 1) -> None:
    _, make, parts = WAYS[name]
    model, reference = make(mlp()), mlp()
    opt = compileclip.wrap(adamw(model.parameters()), BOUND)
    bare = adamw(reference.parameters())
    for step in range(STEPS):
        for micro in range(accumulate):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(micro == accumulate - 1)
            at = 100 * micro + step
            model(batch(data_rank(name), at)).square().sum().backward()
            losses = [reference(batch(part, at)).square().sum() for part in range(parts)]
            (sum(losses) / parts).backward()
        opt.step()
        opt.zero_grad()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), BOUND)
        bare.step()
        bare.zero_grad()
        assert norm > BOUND
        assert opt.total_norm is not None
        # Forward and backward add up in another order; observed: 4e-7.
        torch.testing.assert_close(opt.total_norm, norm, rtol=1e-5, atol=0.0)
        check_same_bits(opt.total_norm)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(a.detach()), b.detach(), rtol=1e-4, atol=1e-5)
    kernels = opt._modes.kernels
    assert kernels.why_not is None
    assert not kernels.refused


@pytest.mark.parametrize("name", WAYS)
def test_ways(on_ranks: Any, name: str) -> None:
    on_ranks(WAYS[name][0], check_way, name)


@pytest.mark.parametrize("name", ["FSDP2", "FSDP2 + TP"])
def test_accumulation(on_ranks: Any, name: str) -> None:
    on_ranks(WAYS[name][0], check_way, name, 2)


def check_mixed_precision() -> None:
    """Parameters and gradients stay float32; forward and backward run in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, twin = (fsdp2(mlp(), mp_policy=policy) for _ in range(2))
    opt, other = compileclip.wrap(adamw(model.parameters()), BOUND), adamw(twin.parameters())
    for step in range(STEPS):
        for m in (model, twin):
            m(batch(dist.get_rank(), step)).float().square().sum().backward()
        opt.step()
        norm: Any = torch.nn.utils.clip_grad_norm_(twin.parameters(), BOUND)
        other.step()
        torch.testing.assert_close(opt.total_norm, norm.full_tensor(), rtol=2.4e-7, atol=0.0)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(whole(p.detach()), whole(q.detach()), rtol=1e-6, atol=1e-7)
            q.data.copy_(p.data)
        opt.zero_grad()
        other.zero_grad()
    assert opt._modes.kernels.why_not is None


def test_mixed_precision(on_ranks: Any) -> None:
    on_ranks(2, check_mixed_precision)


def check_pipeline() -> None:
    """Two stages of plain parameters, and in each of them FSDP2: the group is the pipeline's."""
    pp, dp = mesh(2, 2)["a"], mesh(2, 2)["b"]
    whole_model = mlp()
    halves = whole_model[:2], whole_model[2:]
    stage = mlp()[:2] if pp.get_local_rank() == 0 else mlp()[2:]
    for sharded in (False, True):
        if sharded:
            fully_shard(stage, mesh=dp)
        opt = compileclip.wrap(adamw(stage.parameters()), BOUND, process_group=pp)
        bare = adamw(whole_model.parameters())
        for step in range(STEPS):
            x = batch(0, step)
            loss = whole_model(x).square().sum()
            loss.backward()
            # The same gradients in the stage, as a schedule would send activations.
            if pp.get_local_rank() == 0:
                out = stage(x)
                halfway = halves[0](x).detach().requires_grad_()
                halves[1](halfway).square().sum().backward(inputs=[halfway])
                out.backward(halfway.grad)
            else:
                stage(halves[0](x).detach()).square().sum().backward()
            opt.step()
            norm = torch.nn.utils.clip_grad_norm_(whole_model.parameters(), BOUND)
            bare.step()
            torch.testing.assert_close(opt.total_norm, norm, rtol=1e-5, atol=0.0)
            check_same_bits(opt.total_norm)
            opt.zero_grad()
            bare.zero_grad()
        mine = halves[pp.get_local_rank()].parameters()
        for a, b in zip(stage.parameters(), mine, strict=True):
            torch.testing.assert_close(whole(a.detach()), b.detach(), rtol=1e-4, atol=1e-5)
        assert opt._modes.kernels.why_not is None


def test_pipeline(on_ranks: Any) -> None:
    on_ranks(4, check_pipeline)


def check_fsdp1(use_orig_params: bool) -> None:
    warnings.simplefilter("ignore")
    reference = mlp()
    model = FullyShardedDataParallel(
        mlp(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="process_group="):
        compileclip.wrap(adamw(model.parameters()), BOUND)
    group = dist.group.WORLD
    opt = compileclip.wrap(adamw(model.parameters()), BOUND, process_group=group)
    bare = adamw(reference.parameters())
    for step in range(STEPS):
        model(batch(dist.get_rank(), step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        sum(reference(batch(r, step)).square().sum() for r in range(2)).div(2).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), BOUND)
        bare.step()
        bare.zero_grad()
        torch.testing.assert_close(opt.total_norm, norm, rtol=1e-5, atol=0.0)
        check_same_bits(opt.total_norm)
    with FullyShardedDataParallel.summon_full_params(model):
        for a, b in zip(model.parameters(), reference.parameters(), strict=not use_orig_params):
            if a.shape == b.shape:
                torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)
    assert opt._modes.kernels.why_not is None, opt.explain()


def check_groups_of_one() -> None:
    """For parameters that look like parts and are none."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    p = nn.Parameter(torch.ones(3))
    p._fsdp_flattened = True  # type: ignore[attr-defined]  # FSDP1's mark
    opt = compileclip.wrap(adamw([p]), BOUND, process_group=groups[dist.get_rank()])
    for _ in range(2):
        p.grad = torch.full((3,), 1.0 + dist.get_rank())
        opt.step()
        assert opt.total_norm is not None
        torch.testing.assert_close(opt.total_norm.item(), 3**0.5 * (1 + dist.get_rank()))


def test_groups_of_one(on_ranks: Any) -> None:
    on_ranks(2, check_groups_of_one)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1(on_ranks: Any, use_orig_params: bool) -> None:
    on_ranks(2, check_fsdp1, use_orig_params)


def check_compiled() -> None:
    """Inside a compiled function, the step of sharded parameters runs outside the graph."""
    model, twin = fsdp2(mlp()), fsdp2(mlp())
    opt, eager = (compileclip.wrap(adamw(m.parameters()), BOUND) for m in (model, twin))
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(2):
        for m, run in ((model, compiled), (twin, eager.step)):
            m(batch(dist.get_rank(), step)).square().sum().backward()
            run()
            m.zero_grad()
        torch.testing.assert_close(opt.total_norm, eager.total_norm)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(a.detach()), whole(b.detach()))


def test_compiled(on_ranks: Any) -> None:
    on_ranks(2, check_compiled)
