"""The host's part of a steady step on a GPU, by the stub for its driver: a command, no test.

``python tests/multi_tensor/host_time.py`` prints, for some numbers of tensors, microseconds a step
when Python is warm and when it is cold, and how many functions Python calls in one. With
``--against FOLDER``, another checkout (with an environment in its ``.venv``) is measured in turns
with this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM_UP, STEPS = 30, 300


def unrelated() -> Any:
    """A millisecond of Python that has nothing to do with a step."""
    found: dict[str, list[int]] = {}
    for i in range(2500):
        found[str(i)] = [i] * 3
    return sorted(found, key=lambda k: found[k])


def optimizer(count: int) -> Any:
    import torch

    import compileclip

    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return compileclip.wrap(torch.optim.AdamW(params, lr=1e-3), 1.0, mode="multi_tensor")


def microseconds(opt: Any, cold: bool) -> float:
    times = []
    for _ in range(STEPS):
        if cold:
            unrelated()
        start = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def calls(opt: Any) -> int:
    """Of functions written in Python, and of others, within one step."""
    found = []
    sys.setprofile(lambda frame, event, _: found.append(event))
    try:
        opt.step()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in found) - 1  # that of setprofile


def measure(counts: list[int]) -> dict[str, dict[str, float]]:
    """Of this process's compileclip."""
    import pytest
    from stub_driver import stubbed

    result = {}
    with pytest.MonkeyPatch.context() as patch, stubbed(patch):
        for count in counts:
            opt = optimizer(count)
            for _ in range(WARM_UP):
                opt.step()
            times = {name: microseconds(opt, name == "cold") for name in ("warm", "cold")}
            result[str(count)] = {**times, "calls": calls(opt)}
    return result


def main() -> None:
    """See the file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 150, 2000])
    parser.add_argument("--one", action="store_true")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.counts)))
        return
    pythons = {"this": sys.executable}
    if given.against is not None:
        pythons["other"] = str(given.against / ".venv/bin/python")
    runs: dict[str, list[Any]] = {name: [] for name in pythons}
    for _ in range(given.rounds):
        for name, python in pythons.items():
            command = [
                python,
                str(HERE / "host_time.py"),
                "--one",
                "--counts",
                *map(str, given.counts),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    for count in map(str, given.counts):
        for name, found in runs.items():
            middle = {k: statistics.median(r[count][k] for r in found) for k in found[0][count]}
            print(f"{count:>5} tensors, {name}:", {k: round(v, 1) for k, v in middle.items()})


if __name__ == "__main__":
    main()
