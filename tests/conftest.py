"""What several test files share."""

import importlib.util
import os
import sys
import types
import unittest

import pytest
import torch
from hypothesis import HealthCheck, settings

# torch's list of optimizers imports expecttest for a base class of tests, of which none is used
# here; a GPU machine without a network may not have it.
if importlib.util.find_spec("expecttest") is None:
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]

# Other programs on a machine make drawing and testing slow, which is no fault of what is tested.
settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared machine")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "sweep" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("sweep"):
                item.add_marker(pytest.mark.skip(reason="minutes of compilation; -m sweep"))
    if torch.cuda.is_available() or os.environ.get("COMPILECLIP_GPU_TESTS") == "1":
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):  # of triton_runs.py
                item.add_marker(pytest.mark.gpu)
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    """What one test finds out about a program is nothing to the next."""
    from compileclip.buckets import bucket_step
    from compileclip.multi_tensor import kernel_cache

    for known in (
        kernel_cache._made,
        kernel_cache._checked,
        bucket_step._known,
        bucket_step._formulas,
    ):
        known.clear()
