"""Whole steps where the compiler or the cache fails: right all the same.

Most in processes of their own, under the marker ``sweep`` for the time that imports take.
``tests/native/test_native.py`` has the faults one by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import assert_same, clone_params, params_like, set_grads
from torch.optim import SGD

import compileclip
from compileclip import fallback
from compileclip.fallback import FallbackWarning
from compileclip.native import native_build

STEPS = """
import sys, warnings
import torch, compileclip
from compileclip.lowering import native
native.TIMEOUT = 0.5 if "hang" in sys.argv[1] else 120.0
torch.manual_seed(0)
params = [torch.nn.Parameter(torch.randn(7, 5)) for _ in range(3)]
mode = "eager" if sys.argv[1] == "eager" else "multi_tensor"
opt = compileclip.wrap(torch.optim.SGD(params, lr=0.1, momentum=0.9), 1.0, mode=mode)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for seed in range(3):
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
causes = [str(w.message) for w in caught if w.category is compileclip.FallbackWarning]
print(torch.stack(params).detach().numpy().tobytes().hex(), opt.total_norm.item())
print(*causes)
"""


def start(what: str, cache: str | Path, compiler: Path | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if compiler is not None:
        environment["CXX"] = str(compiler)
    return subprocess.Popen(
        [sys.executable, "-c", STEPS, what],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the steps led to, and the causes of what was not compiled."""
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    bits, causes = out.splitlines()
    return bits, causes


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    return finish(start("eager", tmp_path_factory.mktemp("cache")))[0]


def script(folder: Path, text: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.sweep
def test_four_processes_on_an_empty_cache(tmp_path: Path, right: str) -> None:
    running = [start("at once", tmp_path) for _ in range(4)]
    assert [finish(process) for process in running] == [(right, "")] * 4
    folder = tmp_path / "compileclip"
    libraries = sorted(folder.glob("*.so"))
    assert libraries
    assert sorted(folder.iterdir()) == libraries  # nothing half made is left
    for library in libraries:
        content = library.read_bytes()
        library.unlink()
        library.write_bytes(content[: len(content) // 3])
    assert finish(start("truncated", tmp_path)) == (right, "")
    assert [library.stat().st_size > 10_000 for library in libraries] == [True] * len(libraries)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("text", "cause"),
    [("exec sleep 60", "took longer than 0.5 s"), ("echo 'error: broken' >&2; exit 1", "broken")],
    ids=["hangs", "fails"],
)
def test_a_compiler_that_does_not_compile(
    text: str, cause: str, tmp_path: Path, right: str
) -> None:
    bits, causes = finish(start("hangs", tmp_path, script(tmp_path, text)))
    assert bits == right
    assert cause in causes
    assert "set CXX" in causes


@pytest.mark.sweep
def test_a_compiler_that_makes_something_else(tmp_path: Path, right: str) -> None:
    """It says that all is well, and what it makes is no library."""
    writes = 'for last; do :; done; echo nothing > "$last"'
    bits, causes = finish(start("nonsense", tmp_path, script(tmp_path, writes)))
    assert bits == right
    assert "cannot be stored or loaded" in causes


@pytest.mark.sweep
def test_a_cache_that_cannot_be_written(tmp_path: Path, right: str) -> None:
    """Not even by root; libraries go to a folder of this process."""
    (tmp_path / "compileclip").write_text("no folder")
    assert finish(start("unwritable", tmp_path)) == (right, "")


def test_a_compiler_that_hangs_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path, "exec sleep 60")))
    monkeypatch.setattr(native_build, "TIMEOUT", 0.2)
    monkeypatch.setattr(fallback, "_said", set())
    params = params_like([(3, 4), (5,)])
    others = clone_params(params)
    # A program that nothing else compiles: dampening is what tells.
    ours = compileclip.wrap(
        SGD(params, lr=0.1, momentum=0.9, dampening=0.4), 1.0, mode="multi_tensor"
    )
    theirs = compileclip.wrap(SGD(others, lr=0.1, momentum=0.9, dampening=0.4), 1.0, mode="eager")
    native_build.load.cache_clear()
    for seed in range(3):
        for tensors in (params, others):
            set_grads(tensors, seed)
        if seed == 0:
            with pytest.warns(FallbackWarning, match="took longer than 0.2 s. Remedy: set CXX"):
                ours.step()
        else:
            ours.step()
        theirs.step()
        assert_same(params, others, "parameter")
    assert "took longer" in ours.explain()
