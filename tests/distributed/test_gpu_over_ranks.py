"""One rank over NCCL, whose FSDP2 parameters kernels step without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import whole
from torch import nn
from torch.optim import AdamW

import compileclip

pytestmark = pytest.mark.gpu
LAYERS = 20


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[torch.device]:
    """A group of this process."""
    device = torch.zeros((), device="cuda").device
    store = f"file://{tmp_path}/store"
    dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


def models(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The same model, sharded and not."""
    from torch.distributed.fsdp import fully_shard

    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(nn.Sequential(*(nn.Linear(64, 64) for _ in range(LAYERS))).to(device))
    for layer in made[0]:
        fully_shard(layer)
    fully_shard(made[0])
    return made[0], made[1]


def kernels_of(step: Any) -> list[str]:
    """What ``step`` launches; the host must not wait meanwhile."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == kind]


@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 3.0])
def test_steps_of_fsdp2(one_rank: torch.device, norm_type: float) -> None:
    model, reference = models(one_rank)
    opt = compileclip.wrap(AdamW(model.parameters(), lr=0.01), 0.5, norm_type=norm_type)
    bare = AdamW(reference.parameters(), lr=0.01, foreach=False)
    for step in range(4):
        x = torch.randn(8, 64, device=one_rank)
        for m in (model, reference):
            m(x).square().sum().backward()
        launched = kernels_of(opt.step) if step == 3 else opt.step()
        norm = compileclip.clip_grad_norm_(reference.parameters(), 0.5, norm_type)
        bare.step()
        torch.testing.assert_close(opt.total_norm, norm, rtol=1e-6, atol=0.0)
        opt.zero_grad()
        bare.zero_grad()
    assert opt._modes.kernels.why_not is None
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(p.detach()), q.detach(), rtol=1e-5, atol=1e-6)
    print(len(launched), launched)
    # The norm's two kernels, its power and root, two of the update, copies of addresses.
    assert norm_type != 2.0 or len(launched) <= 16


def test_the_functions(one_rank: torch.device) -> None:
    model, reference = models(one_rank)
    for m in (model, reference):
        m(torch.ones(8, 64, device=one_rank)).square().sum().backward()
    norm = compileclip.clip_grad_norm_(model.parameters(), 0.5)
    expected = compileclip.clip_grad_norm_(reference.parameters(), 0.5)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-5, atol=1e-6)
