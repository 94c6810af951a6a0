"""Each pass has a name, and ``COMPILECLIP_DISABLE_PASSES`` leaves it out by that name."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_optimizer, clone_params, compilations, params_like, set_grads
from torch import Tensor
from torch._inductor import config
from torch.optim import SGD

import compileclip
from compileclip import fallback, passes
from compileclip.fallback import FallbackWarning
from compileclip.graph.inductor_passes import OrderedPasses
from compileclip.passes.share_norm import LARGE

NAMES = [each.name for each in passes.all_passes()]
TOTAL_NORM = torch.ops.compileclip.total_norm


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(fallback, "_said", set())
    with config.patch(fx_graph_cache=False):  # on a cache hit no pass runs
        yield
    torch._dynamo.reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the passes that changed a graph."""
    found: set[str] = set()

    def spy(original: Callable[..., int]) -> Callable[..., int]:
        def call(self: Any, *args: Any) -> int:
            changed = original(self, *args)
            found.update([self.name] if changed else [])
            return changed

        return call

    for each in passes.all_passes():
        monkeypatch.setattr(each, "__call__", spy(each.__call__))
    return found


def pair(mode: str) -> tuple[Any, Any]:
    """The same optimizer in ``mode`` and in eager mode."""
    params = params_like([(3, 4), (5,)])
    ours = compileclip.wrap(SGD(params, lr=0.1, momentum=0.9), 1.0, mode=mode)
    theirs = SGD(clone_params(params), lr=0.1, momentum=0.9)
    return ours, compileclip.wrap(theirs, 1.0, mode="eager")


def step(opt: Any, seed: int) -> None:
    set_grads(opt.param_groups[0]["params"], seed, scale=3)
    opt.param_groups[0]["lr"] = 0.1 / (1 + seed)
    opt.step()


def norms_and_update(a: Tensor, b: Tensor, rate: float) -> tuple[Tensor, ...]:
    """A stock norm, a norm with a large pointwise gradient, and a float that varies."""
    stock = torch.nn.utils.get_total_norm([a[0], b[1]])
    ours = TOTAL_NORM([a * b + a, b], 2.0)
    return stock, ours, a.clone().lerp_(b, 1 - rate)


@pytest.mark.parametrize("name", ["", *NAMES])
def test_a_pass_is_left_out(name: str, ran: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passes.DISABLE, f" {name}, ")
    ours, theirs = pair("inductor")
    with warnings.catch_warnings(record=True) as caught:
        for seed in range(3):
            for opt in (ours, theirs):
                step(opt, seed)
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    if name == "insert_norm_and_scale_pass":
        (message,) = messages
        assert f"{passes.DISABLE} leaves out {name}" in message
        assert f"why eager: {passes.DISABLE} leaves out {name}" in ours.explain()
    else:
        assert not messages
    for mine, other in zip(*(o.param_groups[0]["params"] for o in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)

    side = math.isqrt(LARGE)
    a, b = (torch.randn(side, side) for _ in range(2))
    compiled = torch.compile(norms_and_update, backend="compileclip", fullgraph=True)
    for rate in (0.5, 0.25, 0.125):
        for mine, other in zip(compiled(a, b, rate), norms_and_update(a, b, rate), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    assert ran == {*NAMES} - {name}


def test_without_the_insertion_no_program_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passes.DISABLE, "insert_norm_and_scale_pass")
    ours, theirs = pair("multi_tensor")
    step(theirs, 0)
    with pytest.warns(FallbackWarning, match="leaves out insert_norm_and_scale_pass"):
        step(ours, 0)
    assert compilations(ours._modes.kernels) == 0
    assert_same_optimizer(ours, theirs)


def test_an_unknown_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passes.DISABLE, "share_norm,lift_scalars_pass")
    message = f"names no pass with share_norm; the passes are {', '.join(NAMES)}"
    for mode in ("multi_tensor", "inductor", "auto"):
        ours, theirs = pair(mode)
        set_grads(ours.param_groups[0]["params"], 0)
        with pytest.raises(ValueError, match=message):
            ours.step()
        assert_same_optimizer(ours, theirs)  # nothing was changed
    with pytest.raises(ValueError, match=message):
        compileclip.compile(lambda: None)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(lambda x: x + 1, backend="compileclip")(torch.ones(2))


def test_inductors_caches_know_which_passes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set()
    for name in ("", "share_norm_pass", "fuse_stock_clip_pass"):
        monkeypatch.setenv(passes.DISABLE, name)
        known.add(OrderedPasses(passes.default_passes(), ()).uuid())
    assert len(known) == 3


def test_without_lifting_no_cache_mixes_up_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passes.DISABLE, "lift_scalars_pass")
    assert OrderedPasses(passes.default_passes(), ()).uuid() is None
    x = torch.linspace(0.5, 2, 7)

    def mixed(rate: float) -> Tensor:
        return x.clamp(max=rate) + x * rate

    compiled = torch.compile(mixed, backend="compileclip")
    with config.patch(fx_graph_cache=True):
        for rate in (1.0, 0.9, 0.8, 0.7):
            torch.testing.assert_close(compiled(rate), mixed(rate))


def test_a_pass_is_named_as_its_file() -> None:
    for each in passes.all_passes():
        assert each.name == f"{Path(inspect.getfile(each)).stem}_pass"
        assert each.runs_on in ("step", "captured", "aten")
    assert len(set(NAMES)) == len(NAMES)


def test_the_documented_order_is_this_one() -> None:
    page = Path(__file__).parents[2] / "docs/how_it_works.md"
    assert re.findall(r"^\| `(\w+_pass)` \|", page.read_text(), re.MULTILINE) == NAMES
