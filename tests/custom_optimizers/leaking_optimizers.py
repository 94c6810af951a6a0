"""Optimizers whose step leaves something in the process, each in one way, beside plain descent.

``test_nothing_leaks.py`` loads this file anew for each run, so that whatever is kept in here begins
as it is written.
"""

# What is odd is meant to be: the ways in which people write such things.
# ruff: noqa: B006

from __future__ import annotations

import atexit
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
import tempfile
import threading
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from foreign_optimizers import Foreign
from torch import Tensor

COUNT, TOTAL = 0, torch.zeros(())
STEPS: list[float] = []
CALLS: Counter[str] = Counter()
QUEUE: deque[float] = deque(maxlen=9)
NUMBERS = itertools.count()
GENERATOR = torch.Generator().manual_seed(3)
KNOWN: weakref.WeakSet[Any] = weakref.WeakSet()
CONTEXT: contextvars.ContextVar[int] = contextvars.ContextVar("CONTEXT")
LOG = logging.getLogger(__name__)
PATH = os.path.join(tempfile.mkdtemp(), "steps")


class Odd(Foreign):
    """Plain descent; ``odd`` comes before each parameter's."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        self.odd(group, p, grad)
        p.add_(grad, alpha=-group["lr"])

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        """Nothing."""


def does(odd: Callable[..., Any]) -> type[Odd]:
    """A class whose parameters' steps do that first."""
    return type(odd.__name__, (Odd,), {"odd": odd, "__module__": __name__})


class Plain(Odd):
    """Leaves nothing."""


@does
def Global(self: Any, group: Any, p: Tensor, grad: Tensor) -> None:  # noqa: N802
    global COUNT
    COUNT += 1


@does
def Writes(self: Any, group: Any, p: Tensor, grad: Tensor) -> None:  # noqa: N802
    with open(PATH, "a") as file:
        file.write("step")


Appends = does(lambda self, group, p, grad: STEPS.append(group["lr"]))
Enters = does(lambda self, group, p, grad: CALLS.update(["update"]))
Queues = does(lambda self, group, p, grad: QUEUE.append(group["lr"]))
Takes = does(lambda self, group, p, grad: next(NUMBERS))
GlobalTensor = does(lambda self, group, p, grad: TOTAL.add_(1))
Registers = does(lambda self, group, p, grad: KNOWN.add(self))
InContext = does(lambda self, group, p, grad: CONTEXT.set(CONTEXT.get(0) + 1))
Prints = does(lambda self, group, p, grad: print("step of", tuple(p.shape)))
Logs = does(lambda self, group, p, grad: LOG.warning("step"))
Warns = does(lambda self, group, p, grad: warnings.warn("a step", stacklevel=1))
DrawsInPython = does(lambda self, group, p, grad: random.random())
DrawsInNumpy = does(lambda self, group, p, grad: np.random.rand())
DrawsInTorch = does(lambda self, group, p, grad: torch.rand(2))
DrawsByItsOwn = does(lambda self, group, p, grad: torch.rand(2, generator=GENERATOR))
Seeds = does(lambda self, group, p, grad: torch.manual_seed(4))
Precision = does(lambda self, group, p, grad: torch.set_float32_matmul_precision("high"))
Deterministic = does(lambda self, group, p, grad: torch.use_deterministic_algorithms(True))
Threads = does(lambda self, group, p, grad: torch.set_num_threads(torch.get_num_threads() + 1))
Anomaly = does(lambda self, group, p, grad: torch.autograd.set_detect_anomaly(True))
PrintOptions = does(lambda self, group, p, grad: torch.set_printoptions(precision=9))
Environment = does(lambda self, group, p, grad: os.environ.update(STEPPED="1"))
AtExit = does(lambda self, group, p, grad: atexit.register(len, ""))
Signals = does(lambda self, group, p, grad: signal.signal(signal.SIGUSR1, signal.SIG_IGN))
Collects = does(lambda self, group, p, grad: gc.set_threshold(gc.get_threshold()[0] + 1))
Recursion = does(lambda self, g, p, _: sys.setrecursionlimit(sys.getrecursionlimit() + 1))
Copies = does(lambda self, group, p, grad: copyreg.pickle(Plain, object.__reduce__))
Starts = does(lambda self, g, p, _: threading.Thread(target=STEPS.append, args=[0]).start())
ZeroGrads = does(lambda self, group, p, grad: self.zero_grad())
Hooks = does(lambda self, group, p, grad: p.register_hook(STEPS.append))
Traces = does(lambda self, group, p, grad: sys.settrace(lambda *_: None))
Profiles = does(lambda self, group, p, grad: sys.setprofile(lambda *_: None))
Filters = does(lambda self, group, p, grad: warnings.simplefilter("once"))
Defaults = does(lambda self, g, p, _: self.defaults.update(n=self.defaults.get("n", 0) + 1))
Marks = does(lambda self, g, p, _: p.marks.append(1) if hasattr(p, "marks") else None)
Compiles = does(lambda self, group, p, grad: compiled(grad))
OnAClass = does(lambda self, group, p, grad: setattr(type(self), "count", 1))


@functools.partial(torch.compile, backend="eager")
def compiled(grad: Tensor) -> Tensor:
    return grad + 1


@functools.lru_cache
def factor(lr: float) -> float:
    return 2 * lr


Cached = does(lambda self, group, p, grad: factor(group["lr"]))


@does
def HasADefault(self: Any, g: Any, p: Any, _: Any, kept: list[int] = []) -> None:  # noqa: N802
    kept.append(1)


def counted() -> None:
    counted.calls = getattr(counted, "calls", 0) + 1  # type: ignore[attr-defined]


OnAFunction = does(lambda self, group, p, grad: counted())


def counting() -> tuple[Callable[[], None], Callable[[], int]]:
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    return tick, lambda: count


TICK, TICKS = counting()
InAClosure = does(lambda self, group, p, grad: TICK())


class Tally:
    """Counts, outside of any optimizer."""

    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> None:
        self.count += 1


TALLY = Tally()
ByAnObject = does(lambda self, group, p, grad: TALLY.tick())


class ByItsClass(Odd):
    """Counts in an attribute of its class, by a method of that."""

    count = 0

    @classmethod
    def tick(cls) -> None:
        cls.count += 1

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        self.tick()


class ListOfItsClass(Odd):
    """Appends to a list that all of its class share."""

    rates: list[float] = []  # noqa: RUF012

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        self.rates.append(group["lr"])


class SetsAProperty(Odd):
    """Counts where it sets an attribute."""

    @property
    def rate(self) -> float:
        return 0.0

    @rate.setter
    def rate(self, value: float) -> None:
        STEPS.append(value)

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        self.rate = group["lr"]


class IsDeleted(Odd):
    """Counts how many there were."""

    def __del__(self) -> None:
        STEPS.append(1)


class HoldsAFunction(Odd):
    """Calls what it was given."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.report = lambda lr: STEPS.append(lr)

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        self.report(group["lr"])


class InItsGroup(Odd):
    """The same, in its group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups[0]["report"] = STEPS.append

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        group["report"](group["lr"])


class ByName(Odd):
    """Looks its method up by a name that it makes."""

    def at_step(self) -> None:
        STEPS.append(1)

    def odd(self, group: Any, p: Tensor, grad: Tensor) -> None:
        getattr(self, "_".join(["at", "step"]))()


class Deprecated(Foreign):
    """What torch warns of once in a process."""

    def update(self, group: Any, state: Any, p: Tensor, grad: Tensor) -> None:
        p.add_(-group["lr"], grad)  # type: ignore[call-overload]


ALL = {k: v for k, v in list(globals().items()) if isinstance(v, type) and issubclass(v, Foreign)}
del ALL["Foreign"], ALL["Odd"]
