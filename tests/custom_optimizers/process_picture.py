"""A picture of a process, as far as what a step may leave in it: to compare two of them."""

from __future__ import annotations

import atexit
import collections
import contextvars
import copyreg
import functools
import gc
import itertools
import logging
import os
import random
import signal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.utils import counters

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def picture(module: types.ModuleType) -> dict[str, Any]:
    """What there is, by name; numbers that only grow are ints."""
    path = getattr(module, "PATH", "")
    return {
        "settings": _settings(),
        "random": _random(),
        "dynamo": _dynamo(),
        "filters": [str(each) for each in warnings.filters],
        "registry": sorted(map(str, vars(module).get("__warningregistry__", ()))),
        "environment": dict(os.environ),
        "signals": [str(signal.getsignal(each)) for each in SIGNALS],
        "collector": (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()),
        "watchers": (sys.getprofile() is None, sys.gettrace() is None),
        "recursion": sys.getrecursionlimit(),
        "pickling": sorted(each.__name__ for each in copyreg.dispatch_table),
        "loggers": [str(each) for each in logging.getLogger().handlers],
        "hooks": _hooks(),
        "modes": torch._C._len_torch_dispatch_stack(),
        "file": os.path.exists(path) and os.path.getsize(path),
        "module": seen(module),
        "at exit": atexit._ncallbacks(),
        "threads": threading.active_count(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is other in a later picture: numbers by how much, the rest as it is then."""
    return {k: v - before[k] if type(v) is int else v for k, v in after.items() if v != before[k]}


def seen(value: Any, depth: int = 0) -> Any:
    """What of ``value`` can be compared: data, and what modules, classes and functions keep."""
    if depth > 4:
        return None
    if isinstance(value, int | float | str | bytes | None):
        return value
    if isinstance(value, torch.Generator):
        return hash(value.get_state().numpy().tobytes())
    if isinstance(value, torch.Tensor):
        hooks = len(value._backward_hooks or ()) if value.requires_grad else 0
        return value.tolist(), hooks, seen(vars(value), depth + 1)
    if isinstance(value, weakref.WeakSet):
        return len(value)
    if isinstance(value, contextvars.ContextVar):
        return value.get(None)
    if isinstance(value, functools._lru_cache_wrapper):
        return value.cache_info()
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, types.FunctionType):
        if "leaking_optimizers" not in value.__code__.co_filename:
            return None
        cells = [c.cell_contents for c in value.__closure__ or () if c != types.CellType()]
        kept = (value.__defaults__, vars(value), cells)
        return [seen(each, depth + 1) for each in kept]
    name = value.__module__ if hasattr(value, "__module__") else getattr(value, "__name__", "")
    if str(name).startswith("leaking_optimizers"):
        own = vars(value).items()
        return {k: seen(v, depth + 1) for k, v in own if not k.startswith("__") and k != "PATH"}
    if isinstance(value, dict):
        return {str(k): seen(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | collections.deque):
        return [seen(each, depth + 1) for each in value]
    return None


def _settings() -> list[Any]:
    return [
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        torch.is_anomaly_enabled(),
        torch.is_warn_always_enabled(),
        str(vars(torch._tensor_str.PRINT_OPTS)),
    ]


def _random() -> list[Any]:
    numpy = np.random.get_state()
    return [
        hash(torch.get_rng_state().numpy().tobytes()),
        hash(random.getstate()),
        hash(str(numpy)),
    ]


def _dynamo() -> list[Any]:
    return [
        eval_frame._stance.stance,
        {k: dict(v) for k, v in counters.items() if v},
        len(convert_frame.input_codes.seen),
        len(convert_frame.output_codes.seen),
    ]


def _hooks() -> list[int]:
    optimizers: Any = sys.modules[torch.optim.Optimizer.__module__]
    modules = torch.nn.modules.module
    return [
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
        len(modules._global_forward_hooks),
        len(modules._global_backward_hooks),
    ]


@contextmanager
def put_back() -> Iterator[None]:
    """Whatever settings change within it are afterwards as they were."""
    environment, filters = dict(os.environ), list(warnings.filters)
    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    options, pickling = dict(vars(torch._tensor_str.PRINT_OPTS)), dict(copyreg.dispatch_table)
    limits = gc.get_threshold(), sys.getrecursionlimit(), torch.get_num_threads()
    precision, watchers = torch.get_float32_matmul_precision(), (sys.getprofile(), sys.gettrace())
    try:
        yield
    finally:
        sys.setprofile(watchers[0])
        sys.settrace(watchers[1])
        os.environ.clear()
        os.environ.update(environment)
        warnings.filters[:] = filters  # type: ignore[index]
        for each, handler in handlers.items():
            signal.signal(each, handler)
        vars(torch._tensor_str.PRINT_OPTS).update(options)
        copyreg.dispatch_table.clear()
        copyreg.dispatch_table.update(pickling)
        gc.set_threshold(*limits[0])
        sys.setrecursionlimit(limits[1])
        torch.set_num_threads(limits[2])
        torch.set_float32_matmul_precision(precision)
        torch.set_warn_always(False)
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
        torch._dynamo.reset()
        counters.clear()
