"""Compile C++ source to a shared library, once per machine, and load it.

Libraries lie in torch's own per-user cache directory (``TORCHINDUCTOR_CACHE_DIR``), named by a hash
of source, compiler and options. A library appears under its name complete or not at all, so several
processes may start at once; one that cannot be loaded (truncated, of another machine) is made anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# No contraction: a product and a sum are fused where the source says fma, and nowhere else. The
# other two let loops with square roots and comparisons be vectorized; values do not change.
OPTIONS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"),
)
TIMEOUT = 120.0  # seconds
DIGEST = 32  # bytes at the end of a library's file, which its loader does not read


class CompilerError(RuntimeError):
    """No kernel could be made; ``cause`` and ``remedy`` say why and what helps."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause, self.remedy = cause, remedy


@functools.cache
def load(source: str) -> ctypes.CDLL:
    """The library of ``source``, from the cache or compiled.

    Args:
        source: C++17; functions for callers are ``extern "C"``.

    Raises:
        CompilerError: there is no compiler, it fails, or it takes longer than ``TIMEOUT``; or what
            it made cannot be stored or loaded.
    """
    compiler = find_compiler()
    try:
        return _load(source, compiler)
    except OSError as error:  # no space left, a folder from which nothing may be executed
        raise CompilerError(
            f"a compiled library cannot be stored or loaded: {error}",
            "set TORCHINDUCTOR_CACHE_DIR to a folder for libraries",
        ) from error


def _load(source: str, compiler: str) -> ctypes.CDLL:
    key = hashlib.sha256("\0".join((source, compiler, *OPTIONS, _machine())).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{key[:40]}.so"
    if _is_whole(path):
        with contextlib.suppress(OSError):  # of another machine
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as scratch:
        made = _compile(compiler, source, Path(scratch))
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        library = ctypes.CDLL(str(made))  # stays loaded when its file is gone
        with contextlib.suppress(OSError):
            os.replace(made, path)
    return library


def find_compiler() -> str:
    """The C++ compiler: ``CXX``, or the first of g++, clang++ and c++ that is there."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise CompilerError(
        f"there is no C++ compiler {wanted!r}" if wanted else "there is no C++ compiler",
        "install g++, or set CXX to a compiler",
    )


def _is_whole(path: Path) -> bool:
    """Whether ``path`` ends with the digest of what comes before: to load less is to crash."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(compiler: str, source: str, scratch: Path) -> Path:
    code, made = scratch / "kernel.cpp", scratch / "kernel.so"
    code.write_text(source)
    command = [compiler, *OPTIONS, str(code), "-o", str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise CompilerError(
            f"{compiler} took longer than {TIMEOUT:g} s", "set CXX to another compiler"
        ) from error
    except OSError as error:
        raise CompilerError(f"{compiler} cannot be run: {error}", "set CXX to another") from error
    if done.returncode != 0:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise CompilerError(f"{compiler} failed: {reason.strip()}", "set CXX to another compiler")
    return made


def cache_folder() -> Path:
    """A folder that can be written: torch's own, or one of this process's."""
    # As torch._inductor.runtime.cache_dir_utils has it, whose import takes a second.
    shared = Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", shared)) / "compileclip"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(_own_folder())
    return folder if os.access(folder, os.W_OK) else Path(_own_folder())


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # one without a name, as in some containers
        return str(os.getuid())


@functools.cache
def _own_folder() -> str:
    return tempfile.mkdtemp(prefix="compileclip-")


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        return "\n".join(sorted(found))
    return f"{platform.machine()} {platform.processor()}"
