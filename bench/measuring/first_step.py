"""How long a first step takes: in a fresh process, with the caches on disk empty, then filled.

``python -m bench.measuring.first_step`` is that process: it reads a case and a row's name from its
input and prints seconds, from making the optimizer to the end of its first step; importing torch
and making parameters come before.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.cases.case import Case
from bench.measuring.environment import ROOT


def first_steps(
    case: Case, row: str, cache: Path, limit: float
) -> tuple[float | None, float | None]:
    """Seconds of the first step with empty and with filled caches; None where that fails.

    Args:
        case: what is stepped.
        row: the name of a row.
        cache: an empty folder; it holds the caches afterwards. Inductor splits its command lines
            at spaces, so there must be none in its path.
        limit: seconds for each process.
    """
    with use_caches(cache):
        cold = _in_process(case, row, limit)
        return cold, None if cold is None else _in_process(case, row, limit)


@contextlib.contextmanager
def use_caches(folder: Path | None) -> Iterator[None]:
    """Have this process and those that it starts use the caches in ``folder``; None: their own."""
    if folder is None:
        yield
        return
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder / "triton"}
    before = {name: os.environ.get(name) for name in caches}
    os.environ.update({name: str(path) for name, path in caches.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _in_process(case: Case, row: str, limit: float) -> float | None:
    asked = {"case": asdict(case), "row": row, "threads": torch.get_num_threads()}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.measuring.first_step"],
            input=json.dumps(asked),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            check=True,
        )
        return float(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def main() -> None:
    """Time the first step that the input asks for."""
    from bench.cases.workload import Workload
    from bench.measuring.timing import synchronize
    from bench.rows.registry import ROWS

    asked: dict[str, Any] = json.loads(sys.stdin.read())
    torch.set_num_threads(asked["threads"])
    shapes = tuple(tuple(shape) for shape in asked["case"].pop("shapes"))
    work = Workload(Case(**asked["case"], shapes=shapes))
    row = next(row for row in ROWS if row.name == asked["row"])
    grads, device = work.new_grads(), work.params[0].device
    synchronize(device)
    start = time.perf_counter()
    run = row.start(work)
    run.prepare(grads)
    run.step()
    synchronize(device)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
