"""Faults found by trying to break steps on a GPU; in Triton's interpreter, or on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import params_like, set_grads
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Optimizer

import compileclip
from compileclip.buckets.step_plan import Plan
from compileclip.lowering import targets
from compileclip.lowering.triton import triton_foreach
from compileclip.lowering.triton.triton_code import Code
from compileclip.multi_tensor.eligibility import why_not_decided

pytest.importorskip("triton")
from lowering_operations import CASES, one_operation
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

from compileclip.lowering.triton import triton_scale
from compileclip.lowering.triton.triton_lists import block_list

__all__ = ["device"]  # a fixture


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(triton_foreach, "_is_there", lambda _: True)
        monkeypatch.setattr(targets, "of", targets.Gpu)


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_a_gradient_that_is_to_be_negated(mode: str) -> None:
    """Autograd gives one to a parameter of one element, as a part of a complex tensor."""
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    opt = compileclip.wrap(SGD([a, b], lr=0.1), None, mode=mode)
    for step in range(3):
        opt.zero_grad()
        (torch.complex(a, b).conj() * (2 + 3j)).real.sum().backward()
        assert b.grad is not None
        assert b.grad.is_neg()
        opt.step()
        assert b.item() == pytest.approx(1 - 0.3 * (step + 1))
    c = nn.Parameter(torch.ones(4))
    c.grad = torch._neg_view(torch.ones(4))
    compileclip.wrap(SGD([c], lr=0.1), None, mode=mode).step()
    assert torch.equal(c, torch.full((4,), 1.1))


class Idle(Optimizer):
    """Its second group decays, whatever the gradients are."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "idle": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if group["idle"]:
                    p.mul_(1 - group["lr"])
                else:
                    p.add_(p.grad, alpha=-group["lr"])


def test_the_scale_of_a_bucket_that_reads_no_gradient(device: str) -> None:
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "idle": True}]
    opt = compileclip.wrap(Idle(groups), 1.0, nonfinite="skip")
    for _ in range(4):
        for p in params:
            p.grad = torch.full((3,), 64.0, device=device)
        opt.grad_scale = torch.tensor(64.0, device=device)
        opt.found_inf = torch.tensor(0.0, device=device)
        opt.step()
        assert opt.total_norm.item() == pytest.approx(6**0.5)
    assert params[0][0].item() == pytest.approx(1 - 4 * 0.1 / 6**0.5, rel=1e-5)


def test_a_second_dtype_that_fails_is_not_scaled_twice(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = [torch.ones(3, device=device), torch.ones(3, device=device, dtype=torch.float64)]
    original = triton_scale.write

    def write(lists: Any, *args: Any) -> None:
        if lists[0].dtype == torch.float64:
            raise RuntimeError("ptxas failed")
        original(lists, *args)

    monkeypatch.setattr(triton_scale, "write", write)
    monkeypatch.setattr(triton_foreach, "_failed", False)
    with pytest.raises(RuntimeError, match=r"gradients of torch.float32 written and others not"):
        triton_foreach.scale_(grads, torch.tensor(0.5, device=device))
    assert torch.equal(grads[0].cpu(), torch.full((3,), 0.5))


def test_a_default_device() -> None:
    """That is not the one of lists, which are made on the host."""
    with torch.device("meta"):
        assert block_list([1, 2000], 1024).tolist() == [[0, 0], [1, 0], [1, 1]]
        assert Code(one_operation(CASES["add alpha"], torch.float32).graph).update


def test_functorch_is_not_for_kernels(device: str) -> None:
    def clamped(x: Tensor) -> Tensor:
        p = nn.Parameter(torch.ones(3, device=device))
        p.grad = torch.full((3,), 2.0, device=device)
        compileclip.clip_grad_value_([p], 0.5)
        return x.sum() * p.grad.sum()

    found = torch.func.grad(clamped)(torch.ones(2, device=device))
    assert torch.equal(found.cpu(), torch.full((2,), 1.5))
    assert not triton_foreach._failed


@pytest.mark.parametrize("order", [1.0, float("inf")])
def test_what_is_checked_is_what_runs(
    order: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that ends the norm is compiled for its order before anything is written."""
    from compileclip.lowering.triton import triton_kernel

    orders: list[str] = []
    original = triton_kernel.Kernel.__call__

    def called(self: Any, tables: Any, scalars: Any, values: Any, counts: Any, shares: Any) -> Any:
        orders.append(shares.constants["ORDER"])
        return original(self, tables, scalars, values, counts, shares)

    monkeypatch.setattr(triton_kernel.Kernel, "__call__", called)
    params = [nn.Parameter(p.detach().to(device)) for p in params_like([(3,)])]
    opt = compileclip.wrap(SGD(params, lr=0.1), 1.0, norm_type=order)
    for seed in range(2):
        set_grads(params, seed)
        opt.step()
    assert len(orders) == 3  # the check, and two steps
    assert len(set(orders)) == 1


def test_fused_kernels_that_decide_are_not_given_up_for_a_host_that_waits() -> None:
    params = params_like([(3,)])
    set_grads(params, 0)
    for make, reason in ((SGD, None), (Adagrad, "Adagrad counts its steps on the host here")):
        opt = make(params, lr=0.1, fused=True)
        opt.step()
        found = why_not_decided(opt, Plan(opt, params))
        assert (found is None) if reason is None else (found is not None and reason in found)


def test_in_the_interpreter() -> None:
    """The tests above."""
    assert passed_in_the_interpreter(__file__) >= 8
