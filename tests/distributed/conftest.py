"""Pools of two and four ranks, started when a test asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist
from rank_pool import RankPool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, RankPool]]:
    """By their number of ranks."""
    made: dict[int, RankPool] = {}
    yield made
    for pool in made.values():
        pool.stop()


@pytest.fixture
def on_ranks(pools: dict[int, RankPool]) -> Callable[..., list[Any]]:
    """Run a check on so many ranks."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch without gloo")

    def run(world: int, check: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        return pools.setdefault(world, RankPool(world)).run(check, *args, **options)

    return run
