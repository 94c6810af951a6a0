"""Steps over a GPU's parameters, or in Triton's interpreter, beside eager ones.

In the interpreter torch's optimizers are told that a CPU is as good, and powers are numpy's.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from helpers import clone_params, flat_state, params_like, set_grads
from optimizer_registry import MODULES, OPTIMIZERS, names
from test_optim_db import all_params
from torch import Tensor, nn
from torch.optim import Optimizer
from triton.language.extra import libdevice
from triton.runtime.interpreter import TensorHandle
from triton_runs import INTERPRETED

import compileclip
from compileclip.fallback import FallbackWarning
from compileclip.lowering import targets

SHAPES = [(3, 4), (5,), (3, 400), (1,)]
CAPTURABLE = names(lambda entry: entry.capturable and entry.is_plain)
# In the interpreter, without fused multiply-adds, of values up to about 4; observed: 2.4e-7. On a
# GPU, where step counts stay there and their powers are another libdevice's; not observed yet.
CLOSE = 1e-6


def power(x: Any, y: Any) -> Any:
    data = np.power(x.handle.data, y.handle.data)
    return tl.tensor(TensorHandle(data, y.handle.dtype), y.type)


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        return
    monkeypatch.setattr(targets, "of", targets.Gpu)
    monkeypatch.setattr(targets, "Cpu", lambda: targets.Gpu(torch.device("cpu")))
    monkeypatch.setattr(libdevice, "pow", power)
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "_get_capturable_supported_devices"):
            supported = lambda supports_xla=True: ["cpu", "cuda"]  # noqa: E731
            monkeypatch.setattr(module, "_get_capturable_supported_devices", supported)


@contextmanager
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)  # of the interpreter
        yield


@contextmanager
def no_wait(opt: Any) -> Iterator[None]:
    """Within it, waiting for the device is an error; in the interpreter, asking whether it may."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            item = Tensor.item

            def counts(settings: Any, found_inf: Any, norm: Any) -> bool:
                assert settings.nonfinite == "propagate", "the host decides"
                assert found_inf is None, "the host decides"
                return True

            def read(tensor: Tensor) -> Any:
                caller = sys._getframe(1).f_globals["__name__"]
                assert caller == "compileclip.recording.recorder", (
                    "the host asks"
                )  # a number that torch wraps
                return item(tensor)

            patch.setattr(compileclip.eager.eager_step, "counts", counts)
            patch.setattr(Tensor, "item", read)
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def maker(name: str, **options: Any) -> Callable[[Any], Optimizer]:
    return functools.partial(OPTIMIZERS[name].make, **{"lr": 0.01, "foreach": False, **options})


def twins(make: Callable[[Any], Optimizer], device: str, **options: Any) -> tuple[Any, Any]:
    params = [nn.Parameter(p.detach().to(device)) for p in params_like(SHAPES)]
    ours = compileclip.wrap(make(params), 1.0, mode="multi_tensor", **options)
    options = {"write_grads": False, **options}
    return ours, compileclip.wrap(make(clone_params(params)), 1.0, mode="eager", **options)


def check(ours: Any, theirs: Any, least: float = 0.0) -> None:
    stays = any(isinstance(v, Tensor) and v.is_cuda and v.dim() == 0 for _, v in flat_state(ours))
    close = max(least, 0.0 if ours.total_norm.is_cuda and not stays else CLOSE)
    norms = (ours.total_norm, theirs.total_norm)
    torch.testing.assert_close(*norms, rtol=1.2e-7, atol=0, equal_nan=True)
    pairs = list(zip(all_params(ours), all_params(theirs), strict=True))
    if flat_state(theirs):  # it has none after a first step that did not count
        both = list(zip(flat_state(ours), flat_state(theirs), strict=True))
        assert all(name == other for (name, _), (other, _) in both)
        pairs += [(a, b) for (_, a), (_, b) in both]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=close, atol=close, check_device=False)


def give(opts: tuple[Any, ...], seed: int, bad: float | None = None) -> None:
    for opt in opts:
        set_grads(all_params(opt), seed, scale=0.1 if seed % 2 else 10)
        if bad is not None:
            all_params(opt)[seed % len(SHAPES)].grad.view(-1)[0] = bad
