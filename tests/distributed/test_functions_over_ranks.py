"""The four functions on gradients that ranks hold parts of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import Spot, check_same_bits, mesh, whole
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import compileclip
from compileclip.distributed.process_groups import groups_of

SPOTS = {
    2: [Spot((5, 4), (2,), "S0"), Spot((7,), (2,), "S0"), Spot((3,), (2,), "R"), Spot((4,))],
    4: [
        Spot((5, 4), (2, 2), "S1 S0"),
        Spot((6, 2), (2, 2), "R S0"),
        Spot((7,), (4,), "S0"),
        Spot((4, 4), (2, 2, "b"), "S1"),
        Spot((3,)),
    ],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def held(world: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters with gradients, in parts and whole."""
    torch.manual_seed(1)
    ours, theirs = [], []
    for spot in SPOTS[world]:
        full = torch.randn(spot.shape).to(dtype)
        for params, grad in ((ours, spot.hold(full)), (theirs, full)):
            params.append(nn.Parameter(torch.zeros_like(grad)))
            params[-1].grad = grad.clone()
    return ours, theirs


def check_clip(world: int, order: float, dtype: torch.dtype) -> None:
    ours, theirs = held(world, dtype)
    norm = compileclip.clip_grad_norm_(ours, 0.5, order)
    expected = compileclip.clip_grad_norm_(theirs, 0.5, order)
    assert type(norm) is Tensor
    assert norm.dtype == expected.dtype
    # The order of the sums differs; observed: one unit of float32, 2e-16 in float64.
    rtol = 4e-16 if dtype == torch.float64 else 1.2e-7
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0.0)
    check_same_bits(norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            whole(a.grad), b.grad, rtol=1e-6 if rtol > 1e-9 else rtol, atol=0
        )
    ours, theirs = held(world, dtype)
    grads = [p.grad for p in ours]
    norm = compileclip.get_total_norm(grads, order)
    torch.testing.assert_close(norm, expected, rtol=rtol, atol=0.0)
    compileclip.clip_grads_with_norm_(ours, 0.5, norm)
    for a, b in zip(ours, theirs, strict=True):
        compileclip.clip_grads_with_norm_([b], 0.5, norm)
        assert torch.equal(whole(a.grad), b.grad)
    ours, theirs = held(world, dtype)
    compileclip.clip_grad_value_(ours, 0.3)
    compileclip.clip_grad_value_(theirs, 0.3)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(whole(a.grad), b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("world", [2, 4])
def test_clip(on_ranks: Any, world: int, order: float, dtype: torch.dtype) -> None:
    on_ranks(world, check_clip, world, order, dtype)


def check_absent(all_of_them: bool) -> None:
    """Of one rank, some gradients or all are missing: those add nothing, and nobody waits."""
    ours, _ = held(2, torch.float32)
    norms = []
    for missing in (False, True):
        for i, p in enumerate(ours):
            if dist.get_rank() == 1 and isinstance(p, DTensor) and (i < 2 or all_of_them):
                assert p.grad is not None
                p.grad = None if missing else p.grad.mul_(0.0)
        norms.append(compileclip.clip_grad_norm_(ours, 1e9))
        check_same_bits(norms[-1])
    if not all_of_them:
        assert torch.equal(norms[0], norms[1])


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_rank_without_gradients(on_ranks: Any, all_of_them: bool) -> None:
    on_ranks(2, check_absent, all_of_them)


def check_sums_left_open() -> None:
    params = [
        nn.Parameter(Spot((4, 3), (2,), placed).hold(torch.ones(4, 3))) for placed in ("R", "S0")
    ]
    for p in params:
        part = torch.full((4, 3), float(dist.get_rank() + 1))  # whose sum is 3
        p.grad = DTensor.from_local(part, mesh(2), [Partial()])
    grads = [p.grad for p in params]
    expected = math.sqrt(2 * 12 * 9)
    torch.testing.assert_close(compileclip.get_total_norm(grads).item(), expected)
    norm = compileclip.clip_grad_norm_(params, 1.0)
    torch.testing.assert_close(norm.item(), expected)
    for p in params:
        assert p.grad.placements == p.placements
        torch.testing.assert_close(whole(p.grad), torch.full((4, 3), 3 / expected))
    opt = compileclip.wrap(torch.optim.SGD(params, lr=1.0), None)
    for p in params:
        p.grad = DTensor.from_local(torch.ones(4, 3), mesh(2), [Partial()])
    before = [p.grad for p in params]
    opt.step()
    assert all(p.grad is g for p, g in zip(params, before, strict=True))
    for p in params:
        torch.testing.assert_close(whole(p.detach()), torch.full((4, 3), 1.0 - 2.0))
    torch.testing.assert_close(opt.total_norm.item(), math.sqrt(2 * 12 * 4))
    assert opt._modes.kernels.why_not is None
    alone = compileclip.wrap(torch.optim.SGD(params[:1], lr=1.0), None)
    params[0].grad = DTensor.from_local(torch.ones(4, 3), mesh(2), [Partial()])
    alone.step()
    torch.testing.assert_close(whole(params[0].detach()), torch.full((4, 3), -3.0))


def test_partial_gradients(on_ranks: Any) -> None:
    on_ranks(2, check_sums_left_open)


def check_groups() -> None:
    """Ranks with different plain parameters, as stages of a pipeline."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    own = [nn.Parameter(torch.zeros(3 + rank, 2)) for _ in range(1 + rank)]
    for p in own:
        p.grad = torch.randn_like(p)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, [p.grad for p in own])
    flat = torch.cat([g.flatten() for grads in every for g in grads]).double()
    for given in (dist.group.WORLD, mesh(2, 2), [mesh(2, 2)["a"], mesh(2, 2).get_group("b")]):
        for order in (2.0, 1.0, math.inf, 0.0):
            norm = compileclip.get_total_norm([p.grad for p in own], order, process_group=given)
            expected = torch.linalg.vector_norm(flat, order)
            if order == 0.0:
                expected = torch.tensor(float(sum(map(len, every))))
            torch.testing.assert_close(norm, expected.float(), rtol=1.2e-7, atol=0)
            check_same_bits(norm)
    none = compileclip.get_total_norm([] if rank else [p.grad for p in own], process_group=mesh(4))
    torch.testing.assert_close(none, torch.cat([g.flatten() for g in every[0]]).norm())
    norm = compileclip.clip_grad_norm_(own, 0.5, process_group=mesh(2, 2))
    torch.testing.assert_close(norm, flat.norm().float(), rtol=1.2e-7, atol=0)
    coef = compileclip.eager.reference.clip_coef(0.5, norm)
    for p, before in zip(own, every[rank], strict=True):
        torch.testing.assert_close(p.grad, before * coef)


def test_process_groups(on_ranks: Any) -> None:
    on_ranks(4, check_groups)


def check_groups_and_meshes() -> None:
    """What a mesh's ranks have together is not counted again by a group of the same ranks."""
    rank = dist.get_rank()
    torch.manual_seed(1)
    spots = [Spot((5, 4), (2, 2), "R S0"), Spot((6,), (2, 2, "b"), "S0"), Spot((4,), (4,), "R")]
    fulls = [torch.randn(s.shape) for s in spots]
    held = [s.hold(t) for s, t in zip(spots, fulls, strict=True)]
    own = torch.full((3,), 1.0 + rank)
    every = [torch.full((3,), 1.0 + r) for r in range(4)]
    for order in (2.0, 1.0, math.inf, 0.0):
        # On mesh "b" there are two of the second, one for each half of the ranks.
        seen = [fulls[0], fulls[1], fulls[1], fulls[2], *every]
        expected = torch.linalg.vector_norm(torch.cat([t.flatten() for t in seen]), order)
        expected = torch.tensor(8.0) if order == 0 else expected
        for given in (dist.group.WORLD, mesh(2, 2)):
            norm = compileclip.get_total_norm([*held, own], order, process_group=given)
            torch.testing.assert_close(norm, expected, rtol=2.4e-7, atol=0.0)
            check_same_bits(norm)


def test_groups_and_meshes(on_ranks: Any) -> None:
    on_ranks(4, check_groups_and_meshes)


def check_count(world: int) -> dict[str, tuple[int, int]]:
    """All-reduces of one clip_grad_norm_: ours, and torch's where it has a result."""
    counts = {}
    cases = {
        "FSDP2": (Spot((6, 4), (world,), "S0"),) * 50,
        "TP": (Spot((6, 4), (world,), "S1"), Spot((6,), (world,), "R")) * 25,
        "FSDP2 + TP": (Spot((6, 4), (2, world // 2), "S0 S1"), Spot((8,), (2, world // 2), "S0 R")),
    }
    for name, spots in cases.items():
        found = []
        for clip in (compileclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
            params = [nn.Parameter(s.hold(torch.ones(s.shape))) for s in spots]
            for s, p in zip(spots, params, strict=True):
                p.grad = s.hold(torch.ones(s.shape))
            try:
                with CommDebugMode() as comm:
                    norm = clip(params, 1.0)
                    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                found.append(comm.get_total_counts())
            except RuntimeError:
                found.append(-1)
        counts[name] = (found[0], found[1])
    return counts


def test_number_of_reductions(on_ranks: Any) -> None:
    for world in (2, 4):
        counts = on_ranks(world, check_count, world)
        print(world, counts[0])
        assert all(ours == 1 for ours, _ in counts[0].values()), counts


def check_flattened() -> None:
    """On half of the ranks: dimension by dimension, or at once where there is a group for that."""
    from torch.distributed.device_mesh import init_device_mesh

    root = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("x", "y", "z"))
    half = root["y", "z"]
    assert groups_of(half) == (half.get_group("y"),)  # the other has one rank
    p = nn.Parameter(DTensor.from_local(torch.zeros(3), half, [Shard(0), Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3), half, [Shard(0), Replicate()])
    for flattened in (False, True):
        if flattened:
            whole_half = half._flatten("yz")
            assert groups_of(half) == (whole_half.get_group(),)
        with CommDebugMode() as comm:
            norm = compileclip.clip_grad_norm_([p], 1e9)
        assert comm.get_total_counts() == 1
        torch.testing.assert_close(norm.item(), math.sqrt(6))
        check_same_bits(norm)


def test_flattened_meshes(on_ranks: Any) -> None:
    on_ranks(4, check_flattened)


def check_replicated() -> None:
    """What all ranks hold is counted once, and their bits are made the same."""
    p = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh(2), [Replicate()]))
    p.grad = DTensor.from_local(torch.ones(3) * (1 + dist.get_rank()), mesh(2), [Replicate()])
    norm = compileclip.clip_grad_norm_([p], 1e9)
    check_same_bits(norm)
    torch.testing.assert_close(norm.item(), math.sqrt((3 + 12) / 2))
    q = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh(2), [Shard(0)]))
    q.grad = DTensor.from_local(torch.ones(2, 3), mesh(2), [Shard(0)])
    torch.testing.assert_close(compileclip.clip_grad_norm_([q], 1e9).item(), math.sqrt(12))


def test_replicated(on_ranks: Any) -> None:
    on_ranks(2, check_replicated)
