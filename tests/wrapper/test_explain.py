"""opt.explain(): what a step does, before and after the first one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import params_like, set_grads
from runs import MAX_NORM, Run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD

import compileclip
from compileclip import lowering


class Foreign(SGD):
    """A class whose step is not torch's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("options", "fused", "expected"),
    [
        ({}, False, ["multi_tensor", "inside the update", "16", "mode='auto'", "before the first"]),
        ({"write_grads": True}, True, ["multi_tensor", "written back", "20"]),
        ({"mode": "eager"}, False, ["for-loop", "in place", ">= 24", 'mode="eager" was asked']),
        ({"mode": "eager"}, True, ["fused", "in the fused kernel, written back", "20"]),
        (
            {"mode": "eager", "write_grads": False},
            False,
            ["on copies, piece by piece", ">= 32"],
        ),
        ({"mode": "eager", "max_norm": None}, True, ["none", "measured, not clipped", "16"]),
        ({"nonfinite": "skip"}, False, ["waits for the norm", "fused=True"]),
        ({"nonfinite": "raise"}, False, ["waits for the norm"]),
        ({"mode": "inductor"}, False, ["inductor", "inside the update", "16"]),
        (
            {"mode": "inductor", "write_grads": True},
            False,
            ["inside the update, written back", "20"],
        ),
    ],
)
def test_explain(options: dict[str, Any], fused: bool, expected: list[str]) -> None:
    inner = SGD(params_like([(3, 4), (5,)]), lr=0.1, fused=fused)
    opt = compileclip.wrap(inner, **({"max_norm": 1.0} | options))
    opt.add_param_group({"params": params_like([(7,)])})
    text = opt.explain()
    for part in [*expected, "SGD", "17", "7", "cpu", "torch.float32"]:
        assert part in text, text


def test_explain_counts_the_state() -> None:
    run = Run(True, mode="eager")
    assert "counted after the first step" in run.optimizer.explain()
    run.step(0)
    text = run.optimizer.explain()
    assert ">= 40" in text  # AdamW: exp_avg and exp_avg_sq, read and written
    assert f"clipped to {MAX_NORM}" in text
    foreign = compileclip.wrap(Foreign(params_like([(3,)])), 1.0, write_grads=False, mode="eager")
    assert "copies, all at once" in foreign.explain()


def test_explain_says_which_parameters_are_not_served_and_why() -> None:
    params = [*params_like([(3,), (4,)]), torch.nn.Parameter(torch.zeros(5, 5).t()[:3])]
    opt = compileclip.wrap(SGD(params, lr=0.1), 1.0)
    set_grads(params, 0)
    opt.step()
    text = opt.explain()
    assert "multi_tensor" in text
    assert "eager" in text
    assert (
        "why eager: 1 parameter, one of shape (3, 5): a parameter of shape (3, 5) has gaps" in text
    )


def test_explain_when_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
    text = compileclip.wrap(SGD(params_like([(3,)]), lr=0.1), 1.0).explain()
    assert "why eager: COMPILECLIP_DISABLE=1" in text


def test_explain_on_a_gpu_before_the_first_step() -> None:
    """What a GPU's parameters will be stepped with; there need be no GPU for that."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, device="cuda")) for _ in range(2)]
    text = compileclip.wrap(SGD(params, lr=0.1), 1.0).explain()
    assert "cuda:0" in text
    assert "multi_tensor" in text
    assert "eager" not in text


@pytest.mark.parametrize("mode", ["auto", "multi_tensor"])
@pytest.mark.parametrize(
    ("device", "reason"),
    [("meta", "there are no kernels for meta tensors"), ("cuda", "triton is not installed")],
)
def test_explain_on_a_device_without_kernels(
    device: str, reason: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "has_triton", lambda: False)
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(3, device=device))]
    text = compileclip.wrap(SGD(params, lr=0.1), 1.0, mode=mode).explain()
    assert "multi_tensor" not in text.replace("mode='multi_tensor'", "")
    assert f"why eager: {reason}" in text
