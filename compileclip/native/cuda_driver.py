"""CUDA's driver, as native code calls it: launches of Triton's kernels, copies, pinned memory.

Triton's own way from Python to a launch takes 30 us and more where Python is cold. What it needs of
a compiled kernel is its handle, how many threads it has and how much shared memory; arguments are
packed by its signature. Private parts of Triton used here, read in triton 3.6 and 3.7: that a
``CompiledKernel`` has ``function``, ``metadata`` and ``src.signature``, that two pointers follow
the arguments (scratch memory, of which ours need none). Where a kernel or the driver is another,
Triton goes on to launch.

The functions are a table (``FUNCTIONS``), so that a stub can stand for the driver where there is no
GPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compileclip.fallback import UnsupportedError
from compileclip.native.native_build import CompilerError
from compileclip.native.native_tensors import address, library

# In the order of "Driver" in cuda_driver_source.py; AMD's driver has the same under other names.
FUNCTIONS = (
    "cuLaunchKernel",
    "cuMemcpyHtoDAsync_v2",
    "cuStreamIsCapturing",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemHostAlloc",
    "cuThreadExchangeStreamCaptureMode",
)
WARP = 32  # threads
_SCRATCH = ("global_scratch_size", "profile_scratch_size")


class DriverError(RuntimeError):
    """A function of the driver failed."""


@dataclass(eq=False)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        function: the kernel.
        programs: how many.
        args: all but ``constants``: tensors, integers and floats.
        constants: what it is compiled for, options included.
        compiled: what Triton has compiled, once it was run.
    """

    function: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    compiled: Any = field(default=None, init=False)

    def run(self) -> None:
        """Launch it on the current stream of the current device, by Triton."""
        self.compiled = self.function[(self.programs,)](*self.args, **self.constants)


@dataclass(frozen=True)
class Entry:
    """A compiled kernel, as the driver launches it.

    Attributes:
        function: its handle.
        threads: of each program.
        shared: bytes of shared memory.
        types: of its arguments, as Triton writes them.
        scratch: how many null pointers follow these.
    """

    function: int
    threads: int
    shared: int
    types: tuple[str, ...]
    scratch: int


def entry(launch: Launch) -> Entry | None:
    """What a launch that was run needs; None if that is more than is known here."""
    kernel = launch.compiled
    try:
        metadata = kernel.metadata
        types = tuple(t for t in kernel.src.signature.values() if t != "constexpr")
        scratch = [getattr(metadata, name) for name in _SCRATCH if hasattr(metadata, name)]
        special = metadata.num_ctas != 1 or any(
            getattr(metadata, name, False) for name in ("launch_cooperative_grid", "launch_pdl")
        )
        known = all(t[0] == "*" or t in ("i32", "i64", "fp64") for t in types)
        if special or any(scratch) or not known or len(types) != len(launch.args):
            return None
        threads = metadata.num_warps * WARP
        return Entry(kernel.function, threads, metadata.shared, types, len(scratch))
    except AttributeError:
        return None


class Driver:
    """The driver, for one device.

    Attributes:
        native: ``Driver`` of the native code; valid while this is alive.
        stream: tells the current stream of the device.

    Raises:
        UnsupportedError: there is no such driver, or it lacks a function.
        CompilerError: there is no compiler.
    """

    def __init__(self, functions: dict[str, int], context: int, stream: Callable[[], int]) -> None:
        """Keep what native code needs.

        Args:
            functions: the addresses of ``FUNCTIONS``, by name.
            context: of the device, as the driver has it.
            stream: as the attribute.
        """
        table = [functions[name] for name in FUNCTIONS]
        self._native = array("Q", [*table, context, os.getpid()])
        self.native = address(self._native)
        self.stream = stream

    def copy(self, place: Tensor, numbers: array[int]) -> None:
        """Copy 64-bit numbers to ``place`` on the current stream; nothing waits.

        Raises:
            DriverError: the driver refuses.
        """
        args = (self.native, place.data_ptr(), address(numbers), 8 * len(numbers), self.stream())
        check(library().copy(*args), "copy addresses to the device")

    def copy_captured(self, place: Tensor, numbers: array[int]) -> Captured:
        """As ``copy``, in a CUDA graph that is being captured, and reads again at each replay.

        Returns:
            What has to live as long as the graph.
        """
        kept = ctypes.c_void_p()
        where = (place.data_ptr(), address(numbers), 8 * len(numbers), self.stream())
        status = library().copy_captured(self.native, *where, ctypes.byref(kept))
        check(status, "capture a copy of addresses to the device")
        return Captured(self, 8 * len(numbers), kept)


class Captured:
    """Pinned memory out of which a CUDA graph copies; given back when it is no longer held."""

    def __init__(self, driver: Driver, nbytes: int, slot: ctypes.c_void_p) -> None:
        self._driver, self._nbytes, self._slot = driver, nbytes, slot

    def __del__(self) -> None:
        library().give_back(self._driver.native, self._nbytes, self._slot)


def check(status: int, what: str) -> None:
    """Raise the driver's error ``status``, if it is one."""
    if status:
        raise DriverError(
            f"the device's driver failed to {what}: error {abs(status)} ({_named(abs(status))}). "
            "It may be of an earlier launch: run with CUDA_LAUNCH_BLOCKING=1"
        )


def _named(status: int) -> str:
    text = ctypes.c_char_p()
    try:
        _libcuda().cuGetErrorString(status, ctypes.byref(text))
    except (OSError, AttributeError):
        return "unknown"
    return (text.value or b"unknown").decode()


@functools.cache
def of(device: torch.device) -> Driver | None:
    """The driver of ``device``; None where Triton has to launch."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        driver = _libcuda()
        functions = {name: _entry(getattr(driver, name)) for name in FUNCTIONS}
        library()
    except (OSError, AttributeError, UnsupportedError, CompilerError):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    context, number = ctypes.c_void_p(), ctypes.c_int()
    status = driver.cuDeviceGet(ctypes.byref(number), index)
    # Torch's, which it has made: there are tensors.
    status = status or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
    stream = functools.partial(torch._C._cuda_getCurrentRawStream, index)
    return None if status else Driver(functions, context.value or 0, stream)


def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _entry(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
