"""Native libraries: compiled once per machine, whatever happens to the cache or the compiler."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from compileclip.native import native_build
from compileclip.native.native_build import CompilerError

SOURCE = 'extern "C" double twice(double x) { return 2 * x; }  // @'


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    native_build.load.cache_clear()


def twice(mark: str) -> float:
    function = native_build.load(SOURCE.replace("@", mark)).twice
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    result: float = function(1.5)
    return result


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "compileclip").glob("*.so"))


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert twice("once") == 3.0
    assert len(libraries(tmp_path)) == 1
    native_build.load.cache_clear()
    monkeypatch.setattr(native_build, "_compile", None)
    assert twice("once") == 3.0


def test_a_truncated_library_is_made_anew(tmp_path: Path) -> None:
    twice("cut short")
    (library,) = libraries(tmp_path)
    whole = library.read_bytes()
    library.unlink()  # the loaded one must not change under its process
    library.write_bytes(whole[: len(whole) // 2])
    code = "import test_native as t; print(t.twice('cut short'))"
    assert python(code) == "3.0\n"
    assert library.stat().st_size == len(whole)


def python(code: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_four_processes_at_once(tmp_path: Path) -> None:
    code = "import test_native as t; print(t.twice('four'))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [p.communicate()[0] for p in running] == ["3.0\n"] * 4
    assert len(libraries(tmp_path)) == 1
    assert not list((tmp_path / "cache" / "compileclip").glob("making-*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "compileclip"
    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert twice("read only") == 3.0
    assert not libraries(tmp_path)


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert twice("a file") == 3.0


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo 'error: no such flag' >&2; exit 1", "failed: error: no such flag"),
        ("sleep 60", "took longer than 0.5 s"),
    ],
)
def test_a_compiler_that_fails_or_hangs(
    script: str, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native_build, "TIMEOUT", 0.5)
    with pytest.raises(CompilerError, match=cause):
        twice(script)
    assert not libraries(tmp_path)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerError, match="no C\\+\\+ compiler 'no-such-compiler'"):
        twice("none")


def test_a_folder_from_which_nothing_may_be_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native_build.ctypes, "CDLL", refuse)
    with pytest.raises(CompilerError, match=r"cannot be stored or loaded: .*failed to map"):
        twice("noexec")


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(native_build.getpass, "getuser", nameless)
    assert native_build.cache_folder().parent.name == f"torchinductor_{os.getuid()}"
