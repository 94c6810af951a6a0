"""Whether ranks that take one norm agree on what it is the norm of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compileclip.distributed.process_groups import ranks_of, travels_on
from compileclip.distributed.shards import is_sharded, local
from compileclip.distributed.total_norm import TotalNorm


def check(
    plan: TotalNorm, params: Sequence[Tensor], settings: dict[str, Any], overreaches: bool
) -> bool:
    """See that all ranks of the groups of ``plan`` have the same settings and parameters.

    Of four numbers per group the maxima are taken, twice, and the host waits for the result.

    Args:
        plan: of ``params``.
        params: as the optimizer has them on this rank.
        settings: what has to be the same, by name.
        overreaches: whether powers may leave the range of float64, as parameters of this rank tell.

    Returns:
        Whether they may by those of any rank.

    Raises:
        ValueError: they do not agree; the message says on what.
    """
    said = _said(plan, params, settings)
    device = local(params[0]).device
    differ = torch.zeros((), dtype=torch.int64, device=device)
    wide = torch.full_like(differ, overreaches)
    for _ in range(2):  # the second time, ranks hear of what other groups have found
        for group, each in said:
            number = _hash(each)
            found = torch.tensor([number, -number, 0, 0], dtype=torch.int64, device=device)
            found[2], found[3] = differ, wide
            found = found.to(travels_on(group, device))
            dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
            most, least, heard, wide = found.to(device).unbind()
            differ = torch.maximum(heard, (most != -least).to(torch.int64))
    if differ.item():
        raise ValueError(
            f"ranks disagree on {_difference(said)}: they would not clip and step alike; wrap on "
            "each rank with the same settings and parameters. Nothing was changed"
        )
    return bool(wide.item())


def _said(
    plan: TotalNorm, params: Sequence[Tensor], settings: dict[str, Any]
) -> list[tuple[Any, dict[str, Any]]]:
    """Each group with what its ranks have to agree on."""
    found = []
    for group, members in plan.over_meshes.rounds:
        indices = sorted(i for member in members for i in plan.alike[member].params)
        found.append((group, {**settings, "parameters": [_described(params[i]) for i in indices]}))
    # Stages of a pipeline have different parameters.
    return found + [(group, settings) for group, _ in plan.over_groups.rounds]


def _described(param: Tensor) -> str:
    assert is_sharded(param)
    mesh = f"{param.device_mesh.mesh_dim_names or ''}{tuple(param.device_mesh.shape)}"
    return f"{param.dtype} {tuple(param.shape)}, placed {param.placements} on mesh {mesh}"


def _hash(said: dict[str, Any]) -> int:
    digest = hashlib.sha256(repr(said).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _difference(said: Sequence[tuple[Any, dict[str, Any]]]) -> str:
    """What two ranks say that is not the same; all ranks have to ask."""
    answers = []
    for group, mine in said:
        everybody: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everybody, mine, group=group)
        answers.append((mine, ranks_of(group), everybody))
    for mine, ranks, everybody in answers:
        for rank, theirs in zip(ranks, everybody, strict=True):
            for name in mine:
                ours, other = mine[name], theirs.get(name)
                if ours != other:
                    here, there = _first(ours, other), _first(other, ours)
                    return f"{name}: {here} on rank {dist.get_rank()}, {there} on rank {rank}"
    return "max_norm, other settings or parameters, among ranks that this one is in no group with"


def _first(ours: Any, theirs: Any) -> str:
    """What is said; of a list the first item that differs."""
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return repr(ours)
    for i, item in enumerate(ours):
        if i >= len(theirs) or theirs[i] != item:
            return f"number {i} of {len(ours)} is {item}"
    return f"there are {len(ours)}"
