"""Parameters that ranks hold parts of, beside the same ones whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

import compileclip


@cache
def mesh(*shape: int) -> DeviceMesh:
    """A mesh of all ranks, made once in a process."""
    names = ("a", "b", "c")[: len(shape)]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


@dataclass(frozen=True)
class Spot:
    """How one parameter is held.

    Attributes:
        shape: of the whole.
        on: the shape of the mesh, with the name of one of its dimensions where only that is meant;
            none for a plain tensor.
        placed: "S0", "S1" or "R" for each dimension of the mesh.
        absent: the ranks that have no gradient.
    """

    shape: tuple[int, ...]
    on: tuple[Any, ...] = ()
    placed: str = ""
    absent: tuple[int, ...] = ()

    def mesh(self) -> DeviceMesh:
        """That of its name."""
        shape = tuple(n for n in self.on if isinstance(n, int))
        names = [n for n in self.on if isinstance(n, str)]
        return mesh(*shape)[tuple(names)] if names else mesh(*shape)

    def hold(self, full: Tensor) -> Tensor:
        """``full``, so placed."""
        if not self.on:
            return full.clone()
        placements = [Replicate() if s == "R" else Shard(int(s[1:])) for s in self.placed.split()]
        # Of a copy, for a replicated part would share the memory of ``full``.
        held: Tensor = distribute_tensor(full.clone(), self.mesh(), placements, src_data_rank=None)
        return held


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Twins:
    """An optimizer over parts, and the same one over whole parameters, stepped alike."""

    def __init__(
        self,
        spots: Sequence[Spot],
        make: Callable[[Any], Optimizer],
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        torch.manual_seed(1)
        self.spots, self.dtype = list(spots), dtype
        full = [torch.randn(s.shape).to(dtype) for s in spots]
        self.parts = [nn.Parameter(s.hold(t)) for s, t in zip(spots, full, strict=True)]
        self.wholes = [nn.Parameter(t.clone()) for t in full]
        self.ours = compileclip.wrap(make(self.parts), 0.5, **settings)
        plain = {k: v for k, v in settings.items() if k not in ("process_group", "mode")}
        self.theirs = compileclip.wrap(make(self.wholes), 0.5, mode="eager", **plain)

    def set_grads(self, step: int, poison: float | None = None) -> None:
        """The same gradients for both."""
        torch.manual_seed(100 + step)
        for spot, part, param in zip(self.spots, self.parts, self.wholes, strict=True):
            grad = torch.randn(spot.shape).to(self.dtype)
            if poison is not None and grad.numel():
                grad.view(-1)[-1] = poison
            nobody = len(spot.absent) == dist.get_world_size()
            if spot.absent:
                # Of what the absent ranks hold there is no gradient: zero, as autograd would add.
                grad = self._without_absent(spot, grad)
            param.grad = None if nobody else grad
            part.grad = None if dist.get_rank() in spot.absent else spot.hold(grad)

    def _without_absent(self, spot: Spot, grad: Tensor) -> Tensor:
        held: Any = spot.hold(grad)
        if dist.get_rank() in spot.absent:
            held.to_local().zero_()
        return whole(held)

    def step(self, step: int, **options: Any) -> None:
        self.set_grads(step, **options)
        self.ours.step()
        self.theirs.step()

    def check(self, rtol: float = 1e-6, atol: float = 1e-7) -> None:
        """Norm, parameters, state and gradients; the norm's bits on all ranks."""
        norm, expected = self.ours.total_norm, self.theirs.total_norm
        assert norm is not None
        assert expected is not None
        assert type(norm) is Tensor
        assert norm.dtype == expected.dtype
        # The sums are in another order; observed: one unit of float32.
        torch.testing.assert_close(norm, expected, rtol=1.2e-7, atol=0.0, equal_nan=True)
        check_same_bits(norm)
        for spot, part, param in zip(self.spots, self.parts, self.wholes, strict=True):
            if spot.absent and len(spot.absent) < dist.get_world_size():
                continue  # there a whole parameter is stepped by a gradient of zeros, a part is not
            _assert_close(whole(part.detach()), param.detach(), rtol, atol)
            mine, other = self.ours.state.get(part, {}), self.theirs.state.get(param, {})
            assert mine.keys() == other.keys()
            for name, value in other.items():
                if isinstance(value, Tensor):
                    is_count = name in ("step", "mu_product")
                    assert isinstance(mine[name], DTensor) == (bool(spot.on) and not is_count)
                    _assert_close(whole(mine[name]), value, rtol, atol)
                else:
                    assert mine[name] == value


def _assert_close(mine: Tensor, other: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(mine, other, rtol=rtol, atol=atol, equal_nan=True)


def check_same_bits(norm: Tensor) -> None:
    every = [torch.empty_like(norm) for _ in range(dist.get_world_size())]
    dist.all_gather(every, norm)
    bits = [t.view(torch.int64 if norm.dtype == torch.float64 else torch.int32) for t in every]
    assert all(torch.equal(b, bits[0]) for b in bits), every
