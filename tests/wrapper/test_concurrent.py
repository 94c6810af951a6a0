"""mode="multi_tensor" after a fork and in threads; nothing hangs, and all is right to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(*kinds: str) -> None:
    script = Path(__file__).with_name("concurrent_steps.py")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        # Python 3.12 warns of any fork of a process with threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", script, *kinds],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines() == list(kinds)


def test_forked_processes_step() -> None:
    """A child steps with one thread, as in a DataLoader's workers, or with what it makes itself."""
    run(
        "fork before the first step",
        "fork, one thread in both",
        "fork, one thread in the child",
        "fork, few elements",
        "fork of torch",
    )


def test_a_child_of_a_process_with_threads_steps() -> None:
    """With one thread; with large tensors torch's own step would hang."""
    run("fork", "fork, large")


def test_threads_and_copies() -> None:
    run("two optimizers", "explained while stepping", "copies")
