"""A stub for CUDA's driver on a machine without a GPU: what is launched is recorded, not run.

``stub_libcuda.cpp`` stands for ``libcuda.so.1``, both for our native code and for Triton's own
launcher, which is the installed Triton's. Kernels are not compiled (``ptxas`` takes seconds), so a
compiled kernel here is its signature; parameters lie on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from optimizer_registry import MODULES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compileclip.lowering import targets
from compileclip.lowering.triton import triton_module, triton_norm_kernels, triton_scale
from compileclip.multi_tensor import kernel_cache
from compileclip.native import native_build

STREAM = 0x5EED
SIZES = {"i32": 4, "i64": 8, "fp64": 8}
MOST_ARGUMENTS = 288
KERNELS: dict[int, tuple[str, tuple[str, ...]]] = {}  # name and types of each, by its handle


class Record(ctypes.Structure):
    """As in ``stub_libcuda.cpp``."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        *(
            (name, ctypes.c_uint64)
            for name in ("function", "stream", "programs", "threads", "shared", "context")
        ),
        *((name, ctypes.c_uint64) for name in ("bytes", "place", "origin")),
        ("count", ctypes.c_int64),
        ("arguments", ctypes.c_uint64 * MOST_ARGUMENTS),
    ]


@dataclass(frozen=True)
class Launched:
    """A launch, with what Triton knows of its kernel."""

    name: str
    types: tuple[str, ...]
    arguments: tuple[int, ...]
    programs: int
    threads: int
    shared: int
    stream: int
    context: int


@dataclass(frozen=True)
class Copied:
    """A copy to the device."""

    place: int
    origin: int
    nbytes: int
    stream: int
    context: int
    words: tuple[int, ...]


class Stub:
    """The driver, as tests see it.

    Attributes:
        library: the functions of ``stub_libcuda.cpp``.
        stream: the current one.
    """

    def __init__(self) -> None:
        self.library = libcuda()
        self.library.stub_reset()
        self.stream = STREAM

    def records(self) -> list[Launched | Copied]:
        """All since the last ``reset``, in their order."""
        first = ctypes.POINTER(Record)()
        count = self.library.stub_records(ctypes.byref(first))
        return [self._record(first[i]) for i in range(count)]

    def launches(self) -> list[Launched]:
        """Those of ``records``."""
        return [r for r in self.records() if isinstance(r, Launched)]

    def copies(self) -> list[Copied]:
        """Those of ``records``."""
        return [r for r in self.records() if isinstance(r, Copied)]

    def reset(self) -> None:
        """Forget what was recorded, and what is to go wrong."""
        self.library.stub_reset()

    def _record(self, record: Record) -> Launched | Copied:
        if record.kind:
            where = record.place, record.origin
            words = tuple(record.arguments[i] for i in range(record.count))
            return Copied(*where, record.bytes, record.stream, record.context, words)
        name, types = KERNELS[record.function]
        arguments = tuple(record.arguments[i] for i in range(record.count))
        shape = (record.programs, record.threads, record.shared)
        return Launched(name, types, arguments, *shape, record.stream, record.context)


@functools.cache
def libcuda() -> Any:
    """``stub_libcuda.cpp``, compiled, in the place of ``libcuda.so.1``."""
    source = Path(__file__).parent / "stub_libcuda.cpp"
    folder = tempfile.mkdtemp(prefix="stub-libcuda-")
    made = Path(folder) / "libcuda.so.1"
    options = ("-O1", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1")
    command = [native_build.find_compiler(), *options, str(source), "-o", str(made)]
    subprocess.run(command, check=True, timeout=60)
    triton.knobs.nvidia.libcuda_path = folder
    library: Any = ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
    library.stub_kernel.restype = ctypes.c_void_p
    for name in ("stub_records", "stub_count"):
        getattr(library, name).restype = ctypes.c_int64
    library.stub_fail_at.argtypes = (ctypes.c_int64,)
    library.stub_set_context.argtypes = (ctypes.c_void_p,)
    return library


@contextmanager
def stubbed(monkeypatch: Any) -> Iterator[Stub]:
    """Parameters on the CPU are stepped as on a GPU, by kernels that do nothing."""
    stub = Stub()
    monkeypatch.setattr(targets, "of", targets.Gpu)
    monkeypatch.setattr(targets, "Cpu", lambda: targets.Gpu(torch.device("cpu")))
    monkeypatch.setattr(kernel_cache.DeviceKernels, "_check", lambda *_: None)
    monkeypatch.setattr(
        triton.runtime.JITFunction, "_do_compile", functools.partialmethod(_made, stub)
    )
    if hasattr(targets, "cuda_driver"):  # not in what this is compared with
        _stub_driver(monkeypatch, stub)
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "_get_capturable_supported_devices"):
            supported = lambda supports_xla=True: ["cpu", "cuda"]  # noqa: E731
            monkeypatch.setattr(module, "_get_capturable_supported_devices", supported)
    functions = [triton_norm_kernels.take_shares, triton_norm_kernels.add_shares]
    functions += [triton_scale._write]
    _forget(functions)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_TritonsDriver(stub))
    try:
        yield stub
    finally:
        triton.runtime.driver._active = before
        _forget(functions)


def _forget(functions: list[Any]) -> None:
    """What is compiled of kernels that are not of one program alone."""
    for function in functions:
        function.device_caches.clear()
    triton_module.load.cache_clear()


def _stub_driver(monkeypatch: Any, stub: Stub) -> None:
    from compileclip.native import cuda_driver

    functions = {name: _entry(getattr(stub.library, name)) for name in cuda_driver.FUNCTIONS}
    made = cuda_driver.Driver(functions, 0xC0, lambda: stub.stream)
    monkeypatch.setattr(targets.cuda_driver, "of", lambda _: made)


def _entry(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class _TritonsDriver:
    """What Triton asks its driver, but for a GPU."""

    def __init__(self, stub: Stub) -> None:
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

        self.utils, self.launcher_cls, self._stub = CudaUtils(), CudaLauncher, stub

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self._stub.stream


def _made(
    function: Any,
    stub: Stub,
    key: Any,
    signature: Any,
    device: int,
    constexprs: Any,
    options: Any,
    attrs: Any,
    warmup: bool,
) -> Any:
    """In the place of ``JITFunction._do_compile``: a kernel that is not compiled."""
    source = ASTSource(function, signature, constexprs, attrs)
    types = tuple(t for t in signature.values() if t != "constexpr")
    sizes = [8 if t[0] == "*" else SIZES[t] for t in types]
    handle = stub.library.stub_kernel(
        ctypes.c_int64(len(sizes)), (ctypes.c_int64 * len(sizes))(*sizes)
    )
    scratch = {
        f"{name}_scratch_{what}": 0 if what == "size" else 1
        for name in ("global", "profile")
        for what in ("size", "align")
    }
    metadata = SimpleNamespace(
        num_warps=options.num_warps,
        num_ctas=1,
        shared=16 * options.num_warps,
        launch_cooperative_grid=False,
        launch_pdl=False,
        **scratch,
    )
    kernel = SimpleNamespace(
        src=source,
        metadata=metadata,
        function=handle,
        packed_metadata=(metadata.num_warps, 1, metadata.shared),
        launch_metadata=lambda *_: None,
        run=triton.runtime.driver.active.launcher_cls(source, metadata),
    )
    KERNELS[handle] = (function.__name__, types)
    function.device_caches[device][0][key] = kernel
    return kernel
