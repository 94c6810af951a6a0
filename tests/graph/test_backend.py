"""``torch.compile(fn, backend="compileclip")``: unchanged code, its caches, options and faults."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clone_params, params_like, set_grads
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

import compileclip.passes
from compileclip import fallback
from compileclip.fallback import FallbackWarning
from compileclip.graph import inductor_passes
from compileclip.graph.inductor_passes import SLOT, OrderedPasses, patches

TOTAL_NORM = torch.ops.compileclip.total_norm.default
FOREACH_NORM = torch.ops.aten._foreach_norm.Scalar


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    fallback._said.clear()
    # On a cache hit no pass runs, so that nothing could be counted.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


@dataclass
class Watch(CustomGraphPass):  # type: ignore[misc]
    """A user's pass that does nothing but look; ``key`` is its uuid."""

    key: Any = None
    calls: int = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1

    def uuid(self) -> Any:
        return self.key


@dataclass(frozen=True)
class Spy:
    """One of our passes that records the targets that it sees."""

    seen: list[Any]

    def __call__(self, graph: Graph) -> int:
        self.seen[:] = [n.target for n in graph.nodes]
        return 0


@dataclass(frozen=True)
class Broken:
    """Takes the graph apart, then raises."""

    order: float = 2.0

    def __call__(self, graph: Graph) -> int:
        graph.erase_node(next(n for n in reversed(graph.nodes) if n.op == "call_function"))
        raise ZeroDivisionError("the pass is broken")


def with_passes(monkeypatch: pytest.MonkeyPatch, *ordered: Callable[[Graph], int]) -> None:
    monkeypatch.setattr(inductor_passes.passes, "default_passes", lambda: ordered)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    with_passes(monkeypatch, *compileclip.passes.default_passes(), Spy(seen))
    return seen


def check(steps: int = 2, **kwargs: Any) -> None:
    """Compiled stock clipping and SGD against eager ones, parameters and norm."""
    params = params_like([(5, 4), (7,), (3, 3)])
    others = clone_params(params)

    def step(params: list[Any]) -> torch.Tensor:
        norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        with torch.no_grad():
            for p in params:
                p.sub_(p.grad, alpha=0.1)
        return norm

    compiled = torch.compile(lambda: step(params), backend="compileclip", **kwargs)
    for seed in range(steps):
        set_grads(params, seed)
        set_grads(others, seed)
        torch.testing.assert_close(compiled(), step(others), rtol=1e-6, atol=0)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_unchanged_code_gives_the_numbers_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    check(steps=4)
    assert (seen.count(TOTAL_NORM), seen.count(FOREACH_NORM)) == (1, 0)
    assert torch.ops.aten.cat.default not in seen


def test_it_is_listed() -> None:
    assert "compileclip" in torch.compiler.list_backends()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False, "max_fusion_size": 8}},
        {"dynamic": True},
    ],
)
def test_mode_options_dynamic(monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, Any]) -> None:
    seen, wanted = spied(monkeypatch), {}
    original = inductor_passes.patches

    def recorded(options: Any) -> Any:
        wanted.update(options)
        return original(options)

    monkeypatch.setattr(inductor_passes, "patches", recorded)
    check(**kwargs)
    assert seen.count(TOTAL_NORM) == 1
    expected = kwargs.get("options") or torch._inductor.list_mode_options(kwargs.get("mode")) or {}
    if "dynamic" not in kwargs:
        assert wanted == expected


def test_unknown_options_and_modes_say_what_torch_says() -> None:
    for kwargs in ({"options": {"no_such_option": 1}}, {"mode": "no-such-mode"}):
        with pytest.raises(RuntimeError) as theirs:
            torch.compile(lambda x: x + 1, **kwargs)(torch.ones(2))  # type: ignore[call-overload]
        torch._dynamo.reset()
        with pytest.raises(RuntimeError) as ours:
            torch.compile(lambda x: x + 1, backend="compileclip", **kwargs)(torch.ones(2))
        assert str(theirs.value) in str(ours.value)
        torch._dynamo.reset()


def test_nothing_is_set_process_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.get_config_copy()
    check(steps=1, options={"epilogue_fusion": False})
    assert config.get_config_copy() == before


@pytest.mark.parametrize("where", ["options", "config"])
def test_the_users_pass_is_still_called(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    seen, watch = spied(monkeypatch), Watch()
    if where == "options":
        check(steps=1, options={SLOT: watch})
    else:
        with config.patch({SLOT: watch}):
            check(steps=1)
    assert (watch.calls, seen.count(TOTAL_NORM)) == (1, 1)


def test_all_kinds_of_users_passes_run_before_ours() -> None:
    called: list[Any] = []
    theirs = (Watch(), lambda graph: called.append("callable"))

    def ours(graph: Graph) -> int:
        called.append("ours")
        return 0

    for given in (None, theirs[0], theirs, list(theirs)):
        called.clear()
        patches({SLOT: given}, [ours])[SLOT](Graph())
        assert called[-1] == "ours"
        assert called.count("callable") == isinstance(given, tuple | list)
    assert theirs[0].calls == 3
    if hasattr(torch._inductor.custom_graph_pass, "CustomInferenceAwareGraphPass"):

        class Aware(torch._inductor.custom_graph_pass.CustomInferenceAwareGraphPass):  # type: ignore[misc]
            def __call__(self, graph: Graph, is_inference: bool) -> None:
                called.append(is_inference)

            def uuid(self) -> Any:
                return "aware"

        patches({SLOT: Aware()}, [])[SLOT](Graph(), is_inference=True)
        assert called[-1] is True


def test_uuid_covers_code_fields_and_the_users() -> None:
    def uuid(*ordered: Any, theirs: tuple[Any, ...] = ()) -> Any:
        return OrderedPasses(ordered, theirs).uuid()

    assert uuid(Broken()) == uuid(Broken())
    pickle.dumps(uuid(Broken(), theirs=(Watch("a"),)))
    different = [
        uuid(),
        uuid(Broken()),
        uuid(Broken(order=1.0)),
        uuid(Broken(), Broken(order=1.0)),
        uuid(Broken(order=1.0), Broken()),
        uuid(Broken(), theirs=(Watch("a"),)),
        uuid(Broken(), theirs=(Watch("b"),)),
        uuid(Broken(), theirs=(Watch("a"), Watch("b"))),
    ]
    assert len(set(different)) == len(different)
    for no_uuid in (Watch(None), Watch(""), lambda graph: None):
        assert uuid(Broken(), theirs=(Watch("a"), no_uuid)) is None


def test_uuid_covers_every_file_of_the_passes() -> None:
    files = OrderedPasses((Broken(),), ())._files()
    names = {Path(f).name for f in files}
    assert {"inductor_passes.py", "reference.py", "operators.py", Path(__file__).name} <= names
    folder = Path(str(compileclip.passes.__file__)).parent
    assert {p.name for p in folder.glob("*.py")} <= names
    assert get_hash_for_files(files, "a") != get_hash_for_files(files, "b")


def test_a_broken_pass_is_left_out_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    with_passes(monkeypatch, Broken(), Spy(seen))
    with pytest.warns(FallbackWarning, match="the pass Broken .*ZeroDivisionError: the pass is br"):
        check(steps=1)
    assert seen.count(FOREACH_NORM) == 1
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        check(steps=1)


def test_disabled_runs_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    with_passes(monkeypatch, Broken())
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", None)
    check(steps=1)
