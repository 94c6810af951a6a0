"""The total norm of parameters of which ranks hold parts.

Each rank takes the norm of its parts; their p-th powers are added up over the ranks, in float64. A
parameter that several ranks hold whole is counted once: their powers are divided by their number.
(``inf``: the largest. 0: whether any rank has an element that is not 0, parameter by parameter, as
torch counts.) Who communicates depends on the parameters alone, so a rank may lack gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compileclip.distributed.process_groups import (
    ProcessGroups,
    Reduction,
    groups_of,
    named,
    ranks_of,
)
from compileclip.distributed.shards import is_sharded, local

# Norms of lists on this rank: 0-dim float64 of at least one tensor, by the order p.
LocalNorm = Callable[[Sequence[Tensor], float], Tensor]


@dataclass
class Alike:
    """Parameters with the same mesh, of which as many ranks hold the same part.

    Attributes:
        mesh: None for plain tensors.
        copies: how many ranks of the mesh hold the same part.
        again: how often, then, the groups count their sum.
        params: the indices of the parameters.
    """

    mesh: Any
    copies: int
    again: int = 1
    params: list[int] = field(default_factory=list)


class TotalNorm:
    """How the norm of some parameters is found.

    Attributes:
        alike: the parameters, by mesh and copies.
        over_meshes: how the powers of each of ``alike`` are added up.
        over_groups: how, then, the sum of them all is.
    """

    def __init__(self, params: Sequence[Tensor], groups: ProcessGroups | None = None) -> None:
        """Look at ``params``, at least one, in their order on all ranks."""
        found: dict[tuple[Any, int], Alike] = {}
        for i, p in enumerate(params):
            mesh, copies = (p.device_mesh, _copies(p)) if is_sharded(p) else (None, 1)
            if (mesh, copies) not in found:
                again = 1 if mesh is None else _again(mesh, groups)
                found[mesh, copies] = Alike(mesh, copies, again)
            found[mesh, copies].params.append(i)
        self.alike = list(found.values())
        meshes = [alike.mesh for alike in self.alike]
        self.over_meshes = Reduction([() if m is None else groups_of(m) for m in meshes])
        self.over_groups = Reduction([groups.groups if groups else ()])
        self._device = local(params[0]).device

    def of(
        self, grads: Sequence[Tensor | None], norm_type: float, norm: LocalNorm, overreaches: bool
    ) -> Tensor:
        """The norm of gradients, on the device of the first parameter; all ranks have to call it.

        Args:
            grads: of each parameter this rank's part, or None where this rank has no gradient.
            norm_type: the order p.
            norm: takes norms on this rank.
            overreaches: whether p-th powers may leave the range of float64; as all ranks say.

        Returns:
            A 0-dim float64 tensor, with the same bits on all ranks that the groups connect.
        """
        if norm_type == 0:
            return self._number_of_nonzero(grads)
        parts = [self._part(self._of(alike, grads), norm_type, norm) for alike in self.alike]
        return self.of_parts(parts, norm_type, overreaches)

    def of_parts(self, parts: Sequence[Tensor], norm_type: float, overreaches: bool) -> Tensor:
        """The same from what this rank has of each of ``alike``; not for the order 0."""
        if math.isinf(norm_type):
            return self._extreme(parts, norm_type)
        if not overreaches:
            return self._added_up(parts, norm_type)
        peak = self._extreme(parts, math.copysign(math.inf, norm_type))
        peak = peak.masked_fill(~peak.isfinite() | (peak == 0), 1.0)
        return self._added_up([part / peak for part in parts], norm_type) * peak

    def _of(self, alike: Alike, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """What this rank has of some parameters' gradients."""
        mine = grads if len(self.alike) == 1 else map(grads.__getitem__, alike.params)
        return [g for g in mine if g is not None]

    def _part(self, grads: list[Tensor], norm_type: float, norm: LocalNorm) -> Tensor:
        """The norm of what this rank has."""
        if grads and (norm_type >= 0 or any(map(Tensor.numel, grads))):
            return norm(grads, norm_type).to(self._device)
        nothing = math.inf if norm_type < 0 else 0.0  # to the power of p, and as an extreme
        return torch.full((), nothing, dtype=torch.float64, device=self._device)

    def _added_up(self, parts: Sequence[Tensor], norm_type: float) -> Tensor:
        powers = [
            _power(part, norm_type) / (alike.copies * alike.again)
            for part, alike in zip(parts, self.alike, strict=True)
        ]
        total = sum(self.over_meshes.run(powers, dist.ReduceOp.SUM))
        assert isinstance(total, Tensor)
        (total,) = self.over_groups.run([total], dist.ReduceOp.SUM)
        return total.sqrt() if norm_type == 2 else total.pow(1 / norm_type)

    def _extreme(self, parts: Sequence[Tensor], norm_type: float) -> Tensor:
        """The largest of ``parts``, or for -inf the smallest."""
        sign = math.copysign(1.0, norm_type)
        found = self.over_meshes.largest([part * sign for part in parts])
        (most,) = self.over_groups.largest([torch.stack(found).amax()])
        return most * sign

    def _number_of_nonzero(self, grads: Sequence[Tensor | None]) -> Tensor:
        flags = []
        for alike in self.alike:
            here = [grads[i] for i in alike.params]
            each = [
                torch.zeros((), dtype=torch.bool) if g is None else (g != 0).any() for g in here
            ]
            flags.append(torch.stack([a.to(self._device, torch.float64) for a in each]))
        found = self.over_meshes.run(flags, dist.ReduceOp.MAX)
        counts = [f.sum() / alike.again for f, alike in zip(found, self.alike, strict=True)]
        return self.over_groups.run([torch.stack(counts).sum()], dist.ReduceOp.SUM)[0]

    def described(self) -> list[str]:
        """Who holds what, and what travels for a norm with p = 2, if no gradient is float64."""
        found = []
        for alike in self.alike:
            mesh, count = alike.mesh, len(alike.params)
            where = "plain" if mesh is None else f"on mesh {mesh.mesh_dim_names or ''}{mesh.shape}"
            held = f", of which {alike.copies} ranks each hold the same" if alike.copies > 1 else ""
            found.append(f"{count} parameter{'s' if count > 1 else ''} {where}{held}")
        rounds = [*self.over_meshes.rounds, *self.over_groups.rounds]
        for group, members in rounds:
            found.append(f"one all-reduce of {8 * len(members)} bytes over {named(group)}")
        return found


def _again(mesh: Any, groups: ProcessGroups | None) -> int:
    """How often ``groups`` add up what all ranks of ``mesh`` have."""
    ranks = set(mesh.mesh.flatten().tolist())
    return math.prod(
        len(ranks.intersection(ranks_of(g))) for g in (groups.groups if groups else ())
    )


def _copies(param: Tensor) -> int:
    """How many ranks of its mesh hold the same part of a ``DTensor``.

    Raises:
        ValueError: it is ``Partial``.
    """
    assert is_sharded(param)
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"a tensor of shape {tuple(param.shape)} is placed {param.placements}: a sum that is "
            "still open has no norm; redistribute it first"
        )
    sizes = zip(range(param.device_mesh.ndim), param.placements, strict=True)
    return math.prod(param.device_mesh.size(i) for i, p in sizes if p.is_replicate())


def _power(part: Tensor, norm_type: float) -> Tensor:
    return part * part if norm_type == 2 else part.pow(norm_type)
