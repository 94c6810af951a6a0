"""How a GPU's steps are timed, on a model of a GPU: a queue that the host fills, and two clocks."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import case

from bench.cases.workload import Workload
from bench.measuring import gpu_timing, timing
from bench.measuring.gpu_timing import LEAST, SAFETY, TRIES, GpuClock, clock_for
from bench.measuring.timing import Clock, interleave
from bench.rows.runs import Run

RATE = 1e9  # cycles per second
GPU = torch.device("cuda")


class Machine:
    """Seconds that have passed on the host, and those until which the GPU has work."""

    def __init__(self) -> None:
        self.host = self.until = 0.0
        self.log: list[str] = []
        self.sleeps: list[int] = []
        self.clocks_up = False

    def enqueue(self, seconds: float) -> None:
        self.until = max(self.until, self.host) + seconds

    def sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.sleeps.append(cycles)
        self.enqueue(cycles / (RATE if self.clocks_up else RATE / 4))
        self.clocks_up = True

    def synchronize(self, device: torch.device) -> None:
        self.log.append("wait")
        self.host = max(self.host, self.until)

    def work_elsewhere(self) -> None:
        assert self.host >= self.until, "the GPU is not idle"
        self.log.append("elsewhere")


class Event:
    """A place in the GPU's queue."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.reached = machine, 0.0

    def record(self) -> None:
        self.machine.log.append("event")
        self.reached = max(self.machine.until, self.machine.host)

    def query(self) -> bool:
        return self.machine.host >= self.reached

    def synchronize(self) -> None:
        self.machine.host = max(self.machine.host, self.reached)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.reached - self.reached)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(perf_counter=lambda: made.host))
    monkeypatch.setattr(gpu_timing, "work_elsewhere", made.work_elsewhere)
    for module in (gpu_timing, timing):
        monkeypatch.setattr(module, "synchronize", made.synchronize)
    return made


class Launches(Run):
    """Ten launches, between which the host works for longer than the GPU does on each."""

    def __init__(self, work: Workload, machine: Machine, *hosts: float) -> None:
        super().__init__(work)
        self.machine, self.hosts, self.taken = machine, hosts, 0
        self.seen: list[Any] = []

    def step(self) -> None:
        self.machine.log.append("step")
        self.seen.append(self.params[0].grad)
        host = self.hosts[min(self.taken, len(self.hosts) - 1)]
        self.taken += 1
        for _ in range(10):
            self.machine.host += host / 10
            self.machine.enqueue(1e-5)


class Waits(Launches):
    """Waits for the GPU in each step."""

    def step(self) -> None:
        super().step()
        self.machine.synchronize(GPU)


def test_the_gpu_with_the_host_hidden_and_the_host_apart(machine: Machine) -> None:
    clock = GpuClock(GPU, cold=False)
    machine.log.clear()
    machine.sleeps.clear()
    run = Launches(Workload(case()), machine, 2e-3)
    gpu, host = clock.time(run)
    assert (gpu, host) == (pytest.approx(1e-4), pytest.approx(2e-3))
    assert machine.log == ["wait", "elsewhere", "step", "wait", "sleep", "event", "step", "event"]
    assert machine.sleeps == [round((SAFETY * 2e-3 + LEAST) * RATE)]
    first, second = run.seen
    assert first is not second  # new gradients for each, and none is left
    assert run.params[0].grad is None


def test_cycles_are_counted_under_work(machine: Machine) -> None:
    """The clock of an idle GPU is a quarter as fast here."""
    assert GpuClock(GPU, cold=False)._cycles_per_second == pytest.approx(RATE)


def test_a_sleep_that_was_too_short_is_doubled(machine: Machine) -> None:
    clock = GpuClock(GPU, cold=False)
    machine.sleeps.clear()
    run = Launches(Workload(case()), machine, 1e-3, 8e-3, 5e-3, 4e-3)
    gpu, host = clock.time(run)
    assert (gpu, host) == (pytest.approx(1e-4), pytest.approx(1e-3))
    busy = (SAFETY * 1e-3 + LEAST) * RATE
    assert machine.sleeps == [round(busy), round(2 * busy), round(4 * busy)]
    assert len({id(grad) for grad in run.seen}) == 4


def test_a_step_that_waits_is_not_timed(machine: Machine) -> None:
    clock = GpuClock(GPU, cold=False)
    machine.sleeps.clear()
    work = Workload(case())
    runs = {"waits": Waits(work, machine, 1e-3), "fine": Launches(work, machine, 1e-3)}
    times, errors = interleave(runs, clock, 3, 1)
    assert list(times) == ["fine"]
    assert times["fine"].device == pytest.approx([1e-4] * 3)
    assert times["fine"].host == pytest.approx([1e-3] * 3)
    assert "waits for the GPU" in str(errors["waits"])
    assert len(machine.sleeps) == TRIES + 4


def test_the_clock_of_a_device(machine: Machine) -> None:
    assert type(clock_for(torch.device("cpu"), cold=False)) is Clock
    assert type(clock_for(GPU, cold=False)) is GpuClock


def test_other_work_takes_about_a_millisecond() -> None:
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        gpu_timing.work_elsewhere()
        taken.append(time.perf_counter() - start)
    assert 1e-4 < min(taken) < 2e-2
