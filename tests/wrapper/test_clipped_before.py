"""Gradients that something has clipped before the step: one warning, where it costs nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import params_like, set_grads
from torch.optim import SGD

import compileclip
from compileclip.double_clipping import STEPS, ClippedBefore

SHAPES = [(20, 10), (10,)]


def caught(opt: Any, steps: int, clip: float | None, scale: float = 1.0) -> list[str]:
    """What a user sees who clips to ``clip`` before each step."""
    params = [p for g in opt.param_groups for p in g["params"]]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for seed in range(steps):
            set_grads(params, seed, scale)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params, clip)
            opt.step()
    return [str(w.message) for w in found if "time after time" in str(w.message)]


def wrapped(max_norm: float | None = 1.0, **options: Any) -> Any:
    return compileclip.wrap(SGD(params_like(SHAPES), lr=0.1), max_norm, **options)


@pytest.mark.parametrize("mode", ["eager", "multi_tensor"])
@pytest.mark.parametrize("max_norm", [1.0, 0.3, None])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_it_is_said_once(scale: float, max_norm: float | None, mode: str) -> None:
    clip = 1e-2 if scale < 1 else 1.0
    (message,) = caught(wrapped(max_norm, mode=mode), 8, clip, scale)
    assert f"a total norm of {clip:g}," in message
    assert "max_grad_norm" in message


def test_nothing_is_said_of_gradients_as_they_are() -> None:
    assert not caught(wrapped(), 2 * STEPS, None)
    assert not caught(wrapped(1e4), 8, 1e3)  # a clip that never clips


def test_nothing_is_said_of_the_same_gradients_time_after_time() -> None:
    """As in a benchmark."""
    opt = wrapped(0.5, write_grads=False)
    set_grads([p for g in opt.param_groups for p in g["params"]], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(8):
            opt.step()


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_no_bound_is_read_from_these(value: float) -> None:
    seen = ClippedBefore()
    assert not any(seen.over(torch.tensor(value), value or 1.0) for _ in range(5))


def test_it_ends_after_the_first_steps() -> None:
    opt = wrapped()
    caught(opt, STEPS - 1, None)
    assert opt._clipped_before is not None
    caught(opt, 1, None)
    assert opt._clipped_before is None
    assert copy.deepcopy(opt)._clipped_before is not None


def test_a_norm_that_would_have_to_be_waited_for_is_not_read() -> None:
    assert ClippedBefore().over(torch.empty((), device="meta"), 1.0)
