"""Parameters, gradients and state that lie in memory otherwise than each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizer_registry import makers
from torch import Tensor, nn

import compileclip

MAKERS = makers(["AdamW", "SGD, momentum"], lr=0.1)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, column by column."""
    return tensor.t().contiguous().t()


def every_second_row(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor), 1).view(-1, tensor.shape[1])[::2].copy_(tensor)


def of_state(opt: Any, change: Callable[[Tensor], Tensor]) -> None:
    for state in opt.state.values():
        state.update({k: change(v) for k, v in state.items() if v.dim() > 0})


CASES: dict[str, tuple[Any, Any, Any]] = {  # what becomes of a parameter, gradient and state
    "gradient": (None, transposed, None),
    "parameter": (transposed, None, None),
    "state": (None, None, transposed),
    "gaps in parameter": (every_second_row, None, None),
    "gaps in gradient": (None, every_second_row, None),
    "gaps in all": (every_second_row, every_second_row, every_second_row),
}


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("mode", ["eager", "auto"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("case", CASES)
def test_fused(case: str, name: str, mode: str, write_grads: bool | None) -> None:
    """Not as torch's fused kernels, which take one layout for granted."""
    of_param, of_grad, of_its_state = (c or (lambda t: t) for c in CASES[case])
    start = torch.randn(6, 5)
    p, q = nn.Parameter(of_param(start.clone())), nn.Parameter(start.clone())
    whole = p.detach()._base
    around = None if whole is None else whole.clone()
    ours = compileclip.wrap(MAKERS[name]([p], fused=True), 1.0, mode=mode, write_grads=write_grads)
    theirs = MAKERS[name]([q], foreach=False)
    for step in range(4):
        grad = torch.randn(6, 5)
        p.grad, q.grad = of_grad(grad.clone()), grad.clone()
        given = p.grad
        if step == 1:
            of_state(ours, of_its_state)
        norm = compileclip.clip_grad_norm_([q], 1.0)
        ours.step()
        theirs.step()
        assert torch.equal(ours.total_norm, norm)
        # Roots, and divisions by grad_scale, are rounded otherwise; observed: 2e-7.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert p.grad is given
        if write_grads is not None:
            expected = q.grad if write_grads else grad
            torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
        assert all(group["fused"] for group in ours.param_groups)
    if around is not None and whole is not None:
        assert torch.equal(whole[1::2], around[1::2]), "elements between were written"
