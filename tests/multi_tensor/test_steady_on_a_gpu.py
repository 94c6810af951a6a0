"""Steps by one native call on a CUDA device are as by Triton's launcher, whatever happens."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from helpers import clone_params, flat_state, params_like, same
from optimizer_registry import makers
from test_optim_db import all_params
from torch import nn

import compileclip
from compileclip.native import native_foreach

pytestmark = pytest.mark.gpu

SHAPES = [(37, 5), (1000,), (3,), (70, 300)] * 3
MAKERS = {
    **makers(["AdamW", "RAdam", "SGD, momentum", "NAdam", "Adagrad"], lr=0.01),
    **makers(["AdamW"], lr=0.01, capturable=True),
}


def twins(name: str, **options: Any) -> tuple[Any, Any]:
    params = [nn.Parameter(p.detach().cuda()) for p in params_like(SHAPES)]
    both = [
        MAKERS[name]([{"params": p[:4]}, {"params": p[4:], "lr": 0.02}])
        for p in (params, clone_params(params))
    ]
    ours, theirs = (compileclip.wrap(o, 1.0, mode="multi_tensor", **options) for o in both)
    return ours, theirs


def give(opts: tuple[Any, ...], seed: int, bad: float | None = None) -> None:
    torch.manual_seed(seed)
    pairs = [all_params(opt) for opt in opts]
    for params in zip(*pairs, strict=True):
        grad = torch.randn_like(params[0]) * (0.01 if seed % 3 else 1)
        if bad is not None:
            grad.view(-1)[0] = bad
        for p in params:
            p.grad = grad.clone()


def by_triton(opt: Any) -> None:
    """Step without the native call."""
    if opt._modes.kernels is not None:
        opt._modes.kernels.steady = None
    opt.step()


def quick(opt: Any) -> bool:
    """Step; whether by the native call."""
    steady = opt._modes.kernels and opt._modes.kernels.steady
    opt.step()
    return steady is not None and opt._modes.kernels.steady is steady


def assert_alike(ours: Any, theirs: Any) -> None:
    assert same(ours.total_norm, theirs.total_norm)
    assert all(map(same, all_params(ours), all_params(theirs)))
    for (name, a), (other, b) in zip(flat_state(ours), flat_state(theirs), strict=True):
        assert name == other
        assert same(a, b)


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("name", MAKERS)
def test_as_by_tritons_launcher(name: str, nonfinite: str) -> None:
    decides = name != "Adagrad" or nonfinite == "propagate"  # its step asks for its count
    ours, theirs = twins(name, nonfinite=nonfinite)
    used = 0
    for seed in range(30):
        bad = math.inf if nonfinite == "skip" and seed in (7, 20) else None
        give((ours, theirs), seed, bad)
        for opt in (ours, theirs):
            opt.max_norm = 0.5 if seed == 12 else 1.0
            opt.param_groups[0]["lr"] = 0.01 / (1 + seed)
        used += quick(ours)
        by_triton(theirs)
        assert_alike(ours, theirs)
    assert used >= 20 if decides else used == 0


def test_a_step_on_another_stream() -> None:
    ours, theirs = twins("AdamW")
    streams = [torch.cuda.Stream() for _ in range(3)]
    for seed in range(24):
        give((ours, theirs), seed)
        stream = streams[seed % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000)
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
        by_triton(theirs)
        assert_alike(ours, theirs)


def test_between_replays_of_a_graph() -> None:
    """Both write the gradients' addresses to where kernels find them."""
    ours, theirs = twins("AdamW, capturable")
    for seed in range(4):
        give((ours, theirs), seed)
        ours.step()
        by_triton(theirs)
    fixed = [torch.zeros_like(p) for p in all_params(ours)]
    for p, g in zip(all_params(ours), fixed, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for seed in range(4, 20):
        if seed % 4 < 2:
            give((theirs,), seed)
            for g, p in zip(fixed, all_params(theirs), strict=True):
                g.copy_(p.grad)
            graph.replay()
        else:
            give((ours, theirs), seed)
            ours.step()
        by_triton(theirs)
        assert_alike(ours, theirs) if seed % 4 >= 2 else None
        assert all(map(same, all_params(ours), all_params(theirs)))


def test_nothing_waits_and_little_is_launched() -> None:
    ours, _ = twins("AdamW")
    for seed in range(5):
        give((ours,), seed)
        ours.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=activities) as profile:
            assert quick(ours)  # the same gradients again: there is nothing to copy
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    names = [
        e.name
        for e in profile.events()
        if "Memcpy" in e.name or "compileclip" in e.name or "shares" in e.name
    ]
    assert not any("Memcpy" in name for name in names)
    assert len(names) <= 2 + 2 * 2  # the shares of two buckets, and of each two kernels


def test_two_threads() -> None:
    pairs = [twins("AdamW"), twins("SGD, momentum")]

    def run(ours: Any, theirs: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in range(40):
                grads = [torch.full_like(p, 0.01 * (seed + 1)) for p in all_params(ours)]
                for opt in (ours, theirs):
                    for p, g in zip(all_params(opt), grads, strict=True):
                        p.grad = g.clone()
                ours.step()
                by_triton(theirs)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair in pairs:
        assert_alike(*pair)


def test_memory_stays() -> None:
    """Over steps with other gradients each time, and optimizers made and dropped."""

    def some() -> None:
        ours, _ = twins("AdamW")
        for seed in range(300):
            for p in all_params(ours):
                p.grad = torch.ones_like(p) if seed % 2 else torch.empty_like(p).fill_(0.5)
            ours.step()

    some()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        some()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_process_may_end_at_any_time() -> None:
    code = (
        "import torch, compileclip\n"
        "p = [torch.nn.Parameter(torch.ones(1 << 20, device='cuda')) for _ in range(20)]\n"
        "opt = compileclip.wrap(torch.optim.AdamW(p), 1.0)\n"
        "for _ in range(200):\n"
        "    for q in p: q.grad = torch.ones_like(q)\n"
        "    opt.step()\n"
        "assert opt._modes.kernels.steady is not None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr


FUNCTIONS: dict[str, Any] = {
    "get_total_norm": lambda p, order: compileclip.get_total_norm([q.grad for q in p], order),
    "clip_grad_norm_": lambda p, order: compileclip.clip_grad_norm_(p, 0.5, order),
    "clip_grads_with_norm_": lambda p, _: compileclip.clip_grads_with_norm_(
        p, 0.5, torch.full((), 3.0, device="cuda")
    ),
    "clip_grad_value_": lambda p, _: compileclip.clip_grad_value_(p, 0.5),
}


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("call", FUNCTIONS)
def test_functions(call: str, dtype: torch.dtype, order: float) -> None:
    """Each by Triton's launcher, and then without it: the same bits, on whatever stream."""
    if order != 2 and call.startswith(("clip_grads", "clip_grad_value")):
        pytest.skip("no order")
    native_foreach._entries.clear()
    shapes = [(37, 5), (), (40000,), (0, 3), (2, 3, 4)] * 20
    sources = [torch.randn(s, device="cuda").to(dtype) for s in shapes]
    found = []
    for stream in (None, None, torch.cuda.Stream(), None):
        params = [nn.Parameter(torch.zeros_like(s)) for s in sources]
        for p, source in zip(params, sources, strict=True):
            p.grad = source.clone()
        torch.cuda.synchronize()
        known = len(native_foreach._entries)
        with torch.cuda.stream(stream or torch.cuda.current_stream()):
            norm = FUNCTIONS[call](params, order)
        torch.cuda.synchronize()
        found.append([p.grad for p in params] + ([] if norm is None else [norm]))
        assert len(found) == 1 or len(native_foreach._entries) == known, "compiled again"
    assert native_foreach._entries
    for other in found[1:]:
        assert all(map(same, found[0], other))
