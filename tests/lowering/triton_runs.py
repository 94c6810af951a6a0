"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)


@pytest.fixture
def device() -> str:
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device: run in Triton's interpreter, by test_in_the_interpreter")
    return "cpu" if INTERPRETED else "cuda"


def passed_in_the_interpreter(file: str, *options: str) -> int:
    """Run the tests of a file again; how many passed, or an assertion that none failed."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("the others run here")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},  # read when triton is imported
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return int(re.findall(r"(\d+) passed", done.stdout)[0])
