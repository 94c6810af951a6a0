"""Steps under profilers and tracers: they step as without, and the profile goes on."""

from __future__ import annotations

import cProfile
import gc
import profile
import pstats
import sys
import threading
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
from helpers import assert_same_optimizer, clone_params, params_like, set_grads

import compileclip

SHAPES = [(3, 4), (5,)]
Script = Callable[[], None]


def profiled(profiler: Any) -> Callable[[Script], set[str]]:
    """The names of the functions that a script calls, by a profiler of the standard library."""

    def names(script: Script) -> set[str]:
        profiler.runcall(script)
        stats: Any = pstats.Stats(profiler)
        return {name for _, _, name in stats.stats}

    return names


def watched(get: Any, put: Any) -> Callable[[Script], set[str]]:
    """The same by a function of one's own, as debuggers have."""

    def names(script: Script) -> set[str]:
        found: set[str] = set()

        def watch(frame: Any, event: str, argument: Any) -> Any:
            found.add(frame.f_code.co_name)
            return watch

        before = get()
        put(watch)
        try:
            script()
        finally:
            put(before)
        return found

    return names


def monitored(script: Script) -> set[str]:
    if sys.version_info < (3, 12):
        pytest.skip("sys.monitoring is new in Python 3.12")
    found: set[str] = set()
    here, tool = sys.monitoring, 4
    here.use_tool_id(tool, "test")
    here.register_callback(tool, here.events.PY_START, lambda code, _: found.add(code.co_name))
    here.set_events(tool, here.events.PY_START)
    try:
        script()
    finally:
        here.set_events(tool, 0)
        here.free_tool_id(tool)
    return found


def in_a_thread(script: Script) -> set[str]:
    """As pools of threads are watched: from the start of each."""
    found: set[str] = set()
    raised: list[BaseException] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        found.add(frame.f_code.co_name)

    def run() -> None:
        try:
            script()
        except BaseException as error:
            raised.append(error)

    threading.setprofile(watch)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    assert not raised
    return found


WATCHERS: dict[str, Callable[[], Callable[[Script], set[str]]]] = {
    "cProfile": lambda: profiled(cProfile.Profile()),
    "profile": lambda: profiled(profile.Profile(bias=0)),
    "sys.setprofile": lambda: watched(sys.getprofile, sys.setprofile),
    "sys.settrace": lambda: watched(sys.gettrace, sys.settrace),
    "sys.monitoring": lambda: monitored,
    "threading.setprofile": lambda: in_a_thread,
}


class Watched(foreign.SgnLion):
    """Served, and tried on stand-ins before."""

    def update(self, group: Any, state: Any, p: Any, grad: Any) -> None:
        self.called_in_its_step()
        super().update(group, state, p, grad)

    def called_in_its_step(self) -> None:
        """What a profile tells of while it is tried."""


def called_afterwards() -> None:
    """What a profile is to tell of when all steps are done."""


def trained(cls: Any, params: list[Any], mode: str) -> Any:
    opt = compileclip.wrap(cls(params, lr=0.1), 1.0, mode=mode)
    for seed in range(3):
        set_grads(params, seed)
        opt.step()
    return opt


@pytest.mark.parametrize("mode", ["auto", "multi_tensor", "eager"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, Watched])
@pytest.mark.parametrize("name", WATCHERS)
def test_the_profile_goes_on(name: str, cls: Any, mode: str) -> None:
    params = params_like(SHAPES)
    others = clone_params(params)
    made: list[Any] = []

    def script() -> None:
        made.append(trained(cls, params, mode))
        called_afterwards()

    before = sys.getprofile(), sys.gettrace()
    # Other tests' generators that are collected in the midst would end the profile of "profile",
    # which takes their end for a return of the wrong function.
    gc.collect()
    gc.disable()
    try:
        names = WATCHERS[name]()(script)
    finally:
        gc.enable()
    assert {"trained", "called_afterwards"} <= names
    assert cls is torch.optim.SGD or "called_in_its_step" in names
    assert (sys.getprofile(), sys.gettrace()) == before
    assert_same_optimizer(made[0], trained(cls, others, mode))
    assert mode == "eager" or made[0]._modes.kernels.why_not is None
