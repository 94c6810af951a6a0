"""Steps of mode="multi_tensor" that are captured in a CUDA graph, and what keeps one from it."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from helpers import clone_params, flat_state, params_like, same
from test_optim_db import all_params
from torch import nn

import compileclip
from compileclip.lowering import targets

pytest.importorskip("triton")
from device_steps import check, give, maker, no_fallback, no_wait, on_the_device, twins
from triton_runs import device, passed_in_the_interpreter

__all__ = ["device", "on_the_device"]  # fixtures


def test_what_is_captured_reads_nothing_of_the_host(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as that can be seen without a CUDA graph: no copies, no counts, no decisions."""
    from compileclip.lowering.triton import triton_lists

    ours, theirs = twins(maker("AdamW", capturable=True), device, nonfinite="skip")
    for seed in range(2):
        give((ours, theirs), seed)
        ours.step()
        theirs.step()
    give((ours, theirs), 2)
    with no_fallback(), no_wait(ours), pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
        ours._modes.kernels.steady = None  # which asks the stream
        patch.setattr(triton_lists, "pinned", None)
        ours.step()
    theirs.step()
    check(ours, theirs)


def test_what_a_graph_reads_outlives_another_plan(device: str) -> None:
    """And step counts stay where they are as long as they are the same for all."""
    ours, theirs = twins(maker("AdamW", capturable=True), device)
    for seed in range(2):
        give((ours, theirs), seed)
        ours.step()
    kernels = ours._modes.kernels
    give((ours, theirs), 2)
    with no_fallback(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
        kernels.steady = None  # which asks the stream
        ours.step()
    (work,) = kernels._works
    bucket, extent = work.bucket, work.extent
    read = [work.resident, extent.sizes, extent.blocks, extent.chunks, *extent._slots.values()]
    alive = [weakref.ref(t) for t in (*read, *bucket.counts.values(), work.place.max_norm)]
    counts = [state["step"].data_ptr() for state in ours.state.values()]
    del work, bucket, extent, read
    ours.state[all_params(ours)[0]]["step"].add_(0)  # somebody wrote there
    give((ours, theirs), 3)
    ours.step()
    assert [state["step"].data_ptr() for state in ours.state.values()] == counts
    all_params(ours)[1].grad = None
    ours.step()
    assert len(kernels._works) == 1
    assert all(ref() is not None for ref in alive)


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (maker("AdamW"), {}, "would repeat this step's count"),
        (maker("AdamW", capturable=True), {"nonfinite": "raise"}, 'nonfinite="raise" cannot be'),
        (maker("AdamW", capturable=True), {"max_norm": None}, "another than all before it"),
    ],
    ids=["counts on the host", "raise", "another program"],
)
def test_what_cannot_be_captured_is_eager_for_now(
    make: Any, options: dict[str, Any], reason: str, device: str
) -> None:
    bound = options.pop("max_norm", 1.0)
    ours, theirs = twins(make, device, **options)
    for seed in range(4):
        give((ours, theirs), seed)
        with pytest.MonkeyPatch.context() as patch:
            if seed == 2:
                ours.max_norm = theirs.max_norm = bound
                patch.setattr(targets.Gpu, "is_capturing", lambda _: True)
                ours._modes.kernels.steady = None  # which asks the stream
            ours.step()
        theirs.step()
        check(ours, theirs)
        expected = reason if seed == 2 else None
        why = ours._modes.kernels.why_not
        assert (why is None) if expected is None else (expected in why[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW", "RAdam", "SGD"])
@pytest.mark.parametrize("tensors", [4, 100])
def test_capture_and_replay(name: str, tensors: int) -> None:
    """A captured step goes on counting, clips to the norm of each replay, and skips by itself."""
    options = {} if name == "SGD" else {"capturable": True}
    params = [nn.Parameter(p.detach().cuda()) for p in params_like([(37, 5)] * tensors)]
    ours = compileclip.wrap(
        maker(name, **options)(params), 1.0, mode="multi_tensor", nonfinite="skip"
    )
    theirs = compileclip.wrap(
        maker(name, **options)(clone_params(params)), 1.0, mode="multi_tensor", nonfinite="skip"
    )
    fixed = [torch.zeros_like(p) for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), no_fallback():
        for seed in range(3):
            give((ours, theirs), seed)
            ours.step()
            theirs.step()
    torch.cuda.current_stream().wait_stream(stream)
    for p, g in zip(params, fixed, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_fallback():
        ours.step()
    for seed in range(3, 9):
        give((theirs,), seed, math.nan if seed == 5 else None)
        for g, p in zip(fixed, all_params(theirs), strict=True):
            g.copy_(p.grad)
        if seed == 7:
            ours.max_norm = theirs.max_norm = 0.25
        graph.replay()
        theirs.step()
        assert same(ours.total_norm, theirs.total_norm)
        for a, b in zip(all_params(ours), all_params(theirs), strict=True):
            assert same(a, b)
    for (_, a), (_, b) in zip(flat_state(ours), flat_state(theirs), strict=True):
        assert same(a, b)


def test_in_the_interpreter() -> None:
    """The tests above that need no CUDA graph."""
    assert passed_in_the_interpreter(__file__) >= 4
