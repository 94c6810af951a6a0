"""Sharded gradients: two gloo processes with DTensor and FSDP2, against one process."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import compileclip

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

WORLD = 2


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def check_functions() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for p in (1.0, 2.0, 3.0, math.inf):
            torch.manual_seed(1)
            full = [torch.randn(5, 4).to(dtype), torch.randn(7).to(dtype), torch.randn(3).to(dtype)]
            spots: list[Any] = [[Shard(0)], [Shard(0)], [Replicate()]]
            sharded = [distribute_tensor(t, mesh, s) for t, s in zip(full, spots, strict=True)]
            ours, theirs = (
                [nn.Parameter(torch.zeros_like(t)) for t in ts] for ts in (sharded, full)
            )
            for params, grads in ((ours, sharded), (theirs, full)):
                for q, g in zip(params, grads, strict=True):
                    q.grad = g.clone()
            norm = compileclip.clip_grad_norm_(ours, 0.5, p)
            expected = compileclip.clip_grad_norm_(theirs, 0.5, p)
            assert not isinstance(norm, DTensor)
            assert norm.dtype == expected.dtype
            # The order of the sums differs; observed: 0 in float32, 2e-16 in float64.
            torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
            for a, b in zip(ours, theirs, strict=True):
                assert isinstance(a.grad, DTensor)
                torch.testing.assert_close(a.grad.full_tensor(), b.grad)
            mixed = [sharded[0], full[1]]
            norm = compileclip.get_total_norm(mixed, p)
            torch.testing.assert_close(norm, compileclip.get_total_norm(full[:2], p))


def check_fsdp2(rank: int, write_grads: bool | None, fused: bool) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, reference = mlp(), mlp()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    make = torch.optim.AdamW
    opt = compileclip.wrap(
        make(model.parameters(), lr=0.1, fused=fused), 0.5, write_grads=write_grads
    )
    bare = make(reference.parameters(), lr=0.1, fused=fused)
    for step in range(4):
        model(batch(rank, step)).square().sum().backward()
        opt.step()
        opt.zero_grad()
        # One process with both batches; FSDP2 averages over the ranks.
        sum(reference(batch(r, step)).square().sum() for r in range(WORLD)).div(WORLD).backward()
        norm = compileclip.clip_grad_norm_(reference.parameters(), 0.5)
        bare.step()
        bare.zero_grad()
        assert opt.total_norm is not None
        assert not isinstance(opt.total_norm, DTensor)
        torch.testing.assert_close(opt.total_norm, norm, rtol=1e-5, atol=0.0)
        assert norm > 0.5
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(a, DTensor)
        torch.testing.assert_close(a.full_tensor(), b.detach(), rtol=1e-4, atol=1e-5)


def check_compiled(rank: int) -> None:
    """Inside a compiled function, the step of sharded parameters runs outside the graph."""
    from torch.distributed.fsdp import fully_shard

    model, twin = mlp(), mlp()
    fully_shard(model)
    fully_shard(twin)
    opt, eager = (
        compileclip.wrap(torch.optim.AdamW(m.parameters(), lr=0.1), 0.5) for m in (model, twin)
    )
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(2):
        for m, run in ((model, compiled), (twin, eager.step)):
            m(batch(rank, step)).square().sum().backward()
            run()
            m.zero_grad()
        assert opt.total_norm is not None
        torch.testing.assert_close(opt.total_norm, eager.total_norm)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor())


def work(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    try:
        check_functions()
        check_compiled(rank)
        for write_grads in (None, True, False):
            for fused in (False, True):
                check_fsdp2(rank, write_grads, fused)
    finally:
        dist.destroy_process_group()


def test_sharded_gradients() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=WORLD)
