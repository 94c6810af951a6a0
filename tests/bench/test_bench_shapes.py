"""The benchmark's lists of shapes, and those of a user's model."""

from __future__ import annotations

import argparse
import math

import pytest

from bench.cases import shapes


def test_lists_of_shapes() -> None:
    sizes = {name: sum(map(math.prod, make())) for name, make in shapes.SHAPES.items()}
    assert sizes == {
        "gpt2": 124_439_808,
        "llama-1b": 1_235_814_400,
        "resnet50": 25_557_032,
        "2000x32x32": 2_048_000,
        "64x1024x1024": 67_108_864,
        "1x1000": 1_000,
    }


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "ModuleNotFoundError"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("bench_models:no_such", "AttributeError"),
        ("bench_models:fails", "RuntimeError: no weights"),
        ("bench_models:exits", "SystemExit"),
        ("bench_models:number", "TypeError: 'int' object is not iterable"),
        ("bench_models:frozen", "no parameter that requires a gradient"),
    ],
)
def test_model_that_fails(spec: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        shapes.of_model(spec)
