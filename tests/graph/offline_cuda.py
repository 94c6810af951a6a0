"""The code that Inductor would generate for a GPU, on a machine that has none.

Nothing runs on a device, so this says nothing about speed or values. It stands in for private parts
of torch and triton, read in torch 2.13 and triton 3.7.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

H100 = GPUTarget("cuda", 90, 32)
_PROPERTIES: dict[str, Any] = {
    "name": "NVIDIA H100 80GB HBM3",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
    "total_memory": 80 << 30,
    "max_threads_per_block": 1024,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "L2_cache_size": 50 << 20,
    "uuid": "",
    "gcnArchName": "",
    "clock_rate": 1980000,
    "memory_clock_rate": 2619000,
    "memory_bus_width": 5120,
}


@dataclass(frozen=True)
class Launch:
    """A launch of a generated kernel: what the wrapper passes, by the name of the parameter."""

    kernel: str
    arguments: dict[str, str]

    @property
    def read(self) -> set[str]:
        return {v for k, v in self.arguments.items() if k.startswith(("in_ptr", "in_out_ptr"))}

    @property
    def written(self) -> set[str]:
        return {v for k, v in self.arguments.items() if k.startswith(("out_ptr", "in_out_ptr"))}


@dataclass(frozen=True)
class CudaSource:
    """Generated source, and the launches of Triton kernels in it."""

    text: str

    @property
    def launches(self) -> list[Launch]:
        signatures: dict[str, list[str]] = {}
        found = []
        for line in self.text.splitlines():
            line = line.strip()
            if line.startswith("def triton_"):
                name, _, names = line.removeprefix("def ").removesuffix("):").partition("(")
                signatures[name] = [n.split(":")[0].strip() for n in names.split(",")]
            elif ".run(" in line and line.startswith("triton_"):
                name, _, values = line.partition(".run(")
                passed = [v.strip() for v in values.split(", stream=")[0].split(",")]
                found.append(Launch(name, dict(zip(signatures[name], passed, strict=False))))
        return found


def cuda_source(
    function: Callable[..., Any], inputs: Sequence[Any], options: dict[str, Any]
) -> CudaSource:
    """What Inductor would run for ``function`` on an H100.

    Args:
        function: takes ``inputs``; may write to them.
        inputs: tensors give shapes and dtypes; 0-dim float64 ones stay on the CPU.
        options: Inductor's options.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.compile_fx import compile_fx

    written: list[str] = []

    class StopError(Exception):
        pass

    def capture(*arguments: Any, **_: Any) -> None:
        written.append(next(a for a in arguments if isinstance(a, str) and "async_compile" in a))
        raise StopError

    config = {
        "compile_threads": 1,
        "fx_graph_cache": False,
        "joint_graph_constant_folding": False,  # it would run on the device
        **options,
    }
    with _pretend_h100():
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = [_on_cuda(x) if isinstance(x, Tensor) else x for x in inputs]
        graph = make_fx(function, tracing_mode="fake")(*inputs)
        with (
            torch.no_grad(),
            inductor_config.patch(config),
            mock.patch.object(PyCodeCache, "write", capture),
        ):
            try:
                compile_fx(graph, inputs)
            except Exception:  # StopError, whatever it was wrapped in
                if not written:
                    raise
    return CudaSource("\n".join(written))


def _on_cuda(tensor: Tensor) -> Tensor:
    scalar = tensor.dim() == 0 and tensor.dtype == torch.float64
    return torch.empty_strided(
        tensor.shape,
        tensor.stride(),
        dtype=tensor.dtype,
        device="cpu" if scalar else "cuda:0",
    )


def compile_ptx(kernel: Any, *arguments: Any, **options: Any) -> str:
    """The PTX that a launch of a ``triton.jit`` kernel would compile on an H100."""
    triton.runtime.driver.set_active(_Driver())
    try:
        return kernel.warmup(*arguments, grid=(1,), **options).asm["ptx"]  # type: ignore[no-any-return]
    finally:
        triton.runtime.driver._active = None


class _Driver:
    """What triton asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda:0")

    def is_active(self) -> bool:
        return True

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextlib.contextmanager
def _pretend_h100() -> Iterator[None]:
    from torch.utils._triton import has_triton

    with contextlib.ExitStack() as stack:
        triton.runtime.driver.set_active(_Driver())
        stack.callback(setattr, triton.runtime.driver, "_active", None)
        for patch in _patches():
            stack.enter_context(patch)
        # Asked before or after, it answers for the machine that is there.
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        yield


def _patches() -> Iterator[Any]:
    """What torch asks of a device, answered for an H100."""
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._subclasses.fake_tensor as fake_tensor
    from torch._dynamo.device_interface import CudaInterface

    properties = collections.namedtuple("properties", _PROPERTIES)(**_PROPERTIES)  # type: ignore[misc]
    both = {
        "get_device_properties": properties,
        "current_device": 0,
        "is_available": True,
        "device_count": 1,
    }
    interface = both | {
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    cuda = both | {
        "get_device_capability": (9, 0),
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "synchronize": None,
        "_exchange_device": -1,
        "_maybe_exchange_device": -1,
        "_lazy_init": None,
    }
    for name, value in interface.items():
        yield mock.patch.object(CudaInterface, name, staticmethod(_returning(value)))
    answer = staticmethod(_returning(properties))
    yield mock.patch.object(CudaInterface.Worker, "get_device_properties", answer)
    for name, value in cuda.items():
        yield mock.patch.object(torch.cuda, name, _returning(value))
    yield mock.patch.object(Tensor, "copy_", _copy_)
    yield mock.patch.object(torch, "tensor", _on_fake_device(torch.tensor))
    yield mock.patch.object(joint_graph, "lazy_init", _returning(None))
    # A build for CUDA would make a tensor on the device.
    yield mock.patch.object(fake_tensor, "init_gpu_context", _returning(None))


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return torch.ops.aten.copy_.default(self, source, non_blocking)


def _on_fake_device(tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Inductor's lerp makes a tensor of its weight on the device, which is not there."""

    def make(data: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return tensor(data, **kwargs)
        return torch.full((), data, **kwargs)

    return make
