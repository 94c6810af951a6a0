"""Every optimizer and input that torch lists, wrapped, against ``clip_grad_norm_`` and bare.

The oracle is torch alone: ``torch.nn.utils`` and the bare optimizer. Its float32 norm sums squares
in float32, ours in float64, so the gradients here are integers over 64 whose squares sum to a
square in each tensor: torch's sums and roots are then exact, and the bits can agree.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, assert_same_optimizer, params_like, same
from optimizer_registry import OPTIMIZERS, info_of, torch_inputs
from torch import Tensor
from torch.nn import utils
from torch.optim import Optimizer

import compileclip

STEPS = 6
CLIPS, DOES_NOT = 0.05, 1e3
SHAPES = ((3, 4), (5,), (2, 3, 2))
MATRICES = ((3, 4), (5, 2), (2, 6))  # Muon takes nothing else


def _cases() -> Iterator[Any]:
    for info, given, name in torch_inputs():
        impls = ["foreach"] if "foreach" in info.supported_impls else []
        impls += ["fused"] if "cpu" in info.supports_fused_on else []
        for impl in (None, *impls):
            kwargs = given | ({impl: True} if impl else {})
            yield pytest.param(info, kwargs, id=f"{name}-{impl}")


CASES = list(_cases())


def exact_gradient(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    grad = torch.randint(-8, 9, (torch.Size(shape).numel(),), generator=generator)
    total = int(grad[:-4].square().sum())
    # Four squares can make up any number (Lagrange), so they make the total a square.
    root = next(m for m in itertools.count(1) if m * m >= total + 4)
    side = range(int((root * root - total) ** 0.5) + 1)
    quadruples = itertools.product(side, repeat=4)
    grad[-4:] = torch.tensor(
        next(q for q in quadruples if sum(x * x for x in q) == root * root - total)
    )
    return (grad.double() / 64).view(shape)


@functools.cache
def gradients(shapes: tuple[tuple[int, ...], ...], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [exact_gradient(shape, generator) for shape in shapes]


def make(info: Any, kwargs: dict[str, Any], dtype: torch.dtype) -> Optimizer:
    """The optimizer over two parameter groups; the same each time."""
    torch.manual_seed(0)
    params = params_like(MATRICES if info.name == "Muon" else SHAPES, dtype)
    # A learning rate given as a tensor would be shared, and written to.
    kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return info.optim_cls([{"params": params[:1]}, {"params": params[1:]}], **kwargs)


def all_params(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(info: Any, optimizer: Optimizer, step: int) -> None:
    params = all_params(optimizer)
    for i, (p, g) in enumerate(
        zip(params, gradients(tuple(tuple(p.shape) for p in params), step), strict=True)
    ):
        p.grad = g.to(p.dtype, copy=True)
        if info.only_supports_sparse_grads:
            p.grad = p.grad.to_sparse()
        if (step, i) == (2, 1):
            p.grad = None  # a parameter that got no gradient this time


def values(grad: Tensor) -> Tensor:
    return grad._values() if grad.is_sparse else grad


def grads_of(optimizer: Optimizer) -> list[Tensor]:
    return [values(p.grad).clone() for p in all_params(optimizer) if p.grad is not None]


def torch_clip(optimizer: Optimizer, max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``; sparse gradients, which it refuses, by their values."""
    holders = [torch.empty(0) for _ in all_params(optimizer)]
    for holder, p in zip(holders, all_params(optimizer), strict=True):
        if p.grad is not None:
            holder.data = values(p.grad)
            holder.grad = values(p.grad)
    return utils.clip_grad_norm_(holders, max_norm)


def our_clip(optimizer: Optimizer, max_norm: float) -> Tensor:
    return compileclip.clip_grad_norm_(all_params(optimizer), max_norm)


def dividing_clip(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Clip as torch's fused kernels do with ``grad_scale``: divide by the reciprocal."""
    grads = grads_of(optimizer)
    norm = utils.get_total_norm(grads)
    scale = 1 / torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for p in all_params(optimizer):
        if p.grad is not None:
            p.grad.div_(scale)
    return norm


def check(
    info: Any,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    max_norm: float,
    clip: Callable[[Optimizer, float], Tensor],
    write_grads: bool | None,
) -> None:
    """STEPS steps of the wrapped optimizer and of ``clip`` and the bare one, equal to the bit."""
    ours = compileclip.wrap(
        make(info, kwargs, dtype), max_norm, write_grads=write_grads, mode="eager"
    )
    theirs = make(info, kwargs, dtype)
    for step in range(STEPS):
        give_gradients(info, ours, step)
        give_gradients(info, theirs, step)
        before = grads_of(ours)
        norm = clip(theirs, max_norm)
        ours.step()
        theirs.step()
        assert ours.total_norm is not None
        assert same(ours.total_norm, norm)
        assert (norm > max_norm) == (max_norm == CLIPS)
        assert_same_optimizer(ours, theirs)
        if write_grads is not None:
            expected = grads_of(theirs) if write_grads else before
            assert_same(grads_of(ours), expected, "gradient")


@pytest.mark.parametrize("write_grads", [None, True, False])
@pytest.mark.parametrize("max_norm", [CLIPS, DOES_NOT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_wrapped_is_torchs_clip_and_step(
    info: Any, kwargs: Any, dtype: torch.dtype, max_norm: float, write_grads: bool | None
) -> None:
    # Over fused kernels in float32 the coefficient goes in as grad_scale, by which they divide.
    divides = kwargs.get("fused") and dtype == torch.float32 and write_grads is not False
    check(info, kwargs, dtype, max_norm, dividing_clip if divides else torch_clip, write_grads)


@pytest.mark.parametrize("max_norm", [CLIPS, DOES_NOT])
@pytest.mark.parametrize(("info", "kwargs"), CASES)
def test_wrapped_bfloat16_is_our_clip_and_torchs_step(
    info: Any, kwargs: Any, max_norm: float
) -> None:
    # torch's own norm would be bfloat16 here.
    write_grads = not kwargs.get("fused")
    check(info, kwargs, torch.bfloat16, max_norm, our_clip, write_grads)


FUSED = [case for case in CASES if case.values[1].get("fused")]


@pytest.mark.parametrize(("info", "kwargs"), FUSED)
def test_dividing_differs_from_multiplying_by_rounding_only(info: Any, kwargs: Any) -> None:
    """The one exception to the bits: grad_scale divides. Observed: 3e-7 after 6 steps."""
    ours = compileclip.wrap(make(info, kwargs, torch.float32), CLIPS, mode="eager")
    theirs = make(info, kwargs, torch.float32)
    for step in range(STEPS):
        give_gradients(info, ours, step)
        give_gradients(info, theirs, step)
        norm = torch_clip(theirs, CLIPS)
        ours.step()
        theirs.step()
        assert ours.total_norm is not None
        assert same(ours.total_norm, norm)
    for a, b in zip(all_params(ours), all_params(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_sparse_gradients_of_optimizers_that_also_take_dense_ones(name: str) -> None:
    info = info_of(OPTIMIZERS[name])

    class Sparse:
        only_supports_sparse_grads = True
        optim_cls, name = info.optim_cls, info.name

    for write_grads in (None, True, False):
        check(Sparse, {"lr": 0.1}, torch.float32, CLIPS, torch_clip, write_grads)
