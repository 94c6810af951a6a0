"""The tests for a GPU, on a machine without one: they get as far as their first call of CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

# What torch built for a CPU says of CUDA, and triton of a driver.
NO_CUDA = (
    r"Torch not compiled with CUDA enabled|with backend[s]? .*CUDA|0 active drivers|no CUDA"
    r"|Cannot access accelerator device|Tried to instantiate dummy base class"
    r"|not linked with support for cuda"
)
FILES = (
    *("gpu", "aten_cuda", "counts_on_the_device", "cuda_graphs", "gpu_functions"),
    *("half_precision_on_a_gpu", "lowering_triton", "lowering_triton_norm", "several_devices"),
    *("lowering_triton_programs", "multi_tensor_on_triton", "optim_db_on_a_gpu"),
    *("bench_gpu_timing", "bench_graph_rows", "docs", "steady_on_a_gpu"),
    *("optimizer_registry", "gpu_over_ranks"),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run as they are")
def test_they_reach_cuda(tmp_path: Path) -> None:
    """What they set up before that is right; those with the fixture ``device`` have none to ask."""
    here, report = Path(__file__).parent, tmp_path / "report.xml"
    files = [str(path) for name in FILES for path in here.rglob(f"test_{name}.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(
        [*command, "--tb=short", f"--junitxml={report}", *files],
        env={**os.environ, "COMPILECLIP_GPU_TESTS": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    reached, wrong = 0, []
    for case in cases:
        failure = case.find("failure") if case.find("error") is None else case.find("error")
        if failure is None:
            continue
        reached += 1
        if not re.search(NO_CUDA, f"{failure.get('message')}\n{failure.text}"):
            wrong.append(f"{case.get('classname')}::{case.get('name')}: {failure.get('message')}")
    assert not wrong, "\n".join(wrong[:20]) + done.stdout[-1000:]
    assert reached > 600


def test_each_file_with_tests_for_a_gpu_is_listed() -> None:
    here = Path(__file__).parent
    marked = {p for p in here.rglob("test_*.py") if "mark.gpu" in p.read_text()} - {Path(__file__)}
    assert {path.stem for path in marked} <= {f"test_{name}" for name in FILES}
