"""Models, gradients and comparisons that several test files use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def params_like(shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.float32) -> list[Any]:
    drawn = (torch.randn(tuple(s), dtype=torch.float64) for s in shapes)
    return [torch.nn.Parameter(t.to(dtype)) for t in drawn]


def set_grads(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """The same random gradients for the same seed, in each parameter's dtype."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        dtype = torch.complex128 if p.is_complex() else torch.float64
        grad = torch.randn(p.shape, dtype=dtype, generator=generator) * scale
        p.grad = grad.to(p.dtype).to(p.device)


def clone_params(params: Iterable[Tensor]) -> list[Any]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def flat_state(optimizer: Optimizer) -> list[tuple[str, Any]]:
    """All state in the order of the parameters, by name."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            for name, value in sorted(optimizer.state.get(p, {}).items()):
                found.append((name, value))
    return found


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, NaN in the same places, same dtype and shape."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(ours: Iterable[Any], theirs: Iterable[Any], what: str) -> None:
    for i, (a, b) in enumerate(zip(list(ours), list(theirs), strict=True)):
        assert same(a, b), f"{what} {i} differs:\n{a}\n{b}"


def assert_same_optimizer(ours: Optimizer, theirs: Optimizer) -> None:
    """Parameters and state agree to the bit."""
    mine = [p for g in ours.param_groups for p in g["params"]]
    other = [p for g in theirs.param_groups for p in g["params"]]
    assert_same(mine, other, "parameter")
    a, b = flat_state(ours), flat_state(theirs)
    assert [name for name, _ in a] == [name for name, _ in b]
    assert_same([v for _, v in a], [v for _, v in b], "state")


def compilations(kernels: Any) -> int:
    """How many programs the kernels of an optimizer have compiled."""
    return sum(place.compilations for place in kernels._places.values())
