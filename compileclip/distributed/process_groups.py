"""Process groups: which ranks add up a number, and how it travels.

Private parts of torch used here, read in torch 2.11 to 2.13: ``ProcessGroup._device_types`` and
``DeviceMesh._flatten_mapping``, for want of a public way; without the second a number is reduced
over one dimension of a mesh after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class ProcessGroups:
    """Groups of ranks that hold different parameters, this rank in each; without one, none.

    A copy of an object that holds them shares them.
    """

    def __init__(self, groups: Sequence[ProcessGroup] = ()) -> None:
        self.groups = tuple(groups)

    def __bool__(self) -> bool:
        return bool(self.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessGroups) and self.groups == other.groups

    def __hash__(self) -> int:
        return hash(self.groups)

    def __repr__(self) -> str:
        return f"[{', '.join(map(named, self.groups))}]"

    def __copy__(self) -> ProcessGroups:
        return self

    def __deepcopy__(self, memo: object) -> ProcessGroups:
        return self

    def __reduce__(self) -> Any:
        if not self.groups:
            return ProcessGroups, ()
        raise TypeError(
            f"process_group={self!r} belongs to this process and cannot be pickled; save "
            "opt.state_dict(), and wrap the optimizer with a group of the process that loads it"
        )


def named(group: ProcessGroup) -> str:
    """What to call a group in a message."""
    return f"the group of ranks {ranks_of(group)}"


def ranks_of(group: ProcessGroup) -> tuple[int, ...]:
    """The global ranks of a group, in their order there."""
    return tuple(dist.get_process_group_ranks(group))


def process_groups(given: Any) -> ProcessGroups:
    """What a user gave as ``process_group``: a group, a mesh, or several of them.

    Raises:
        TypeError: it is something else.
        ValueError: this rank is in none of that.
    """
    if isinstance(given, ProcessGroups):
        return given
    found: dict[tuple[int, ...], Any] = {}
    for group in _flattened(given):
        found.setdefault(ranks_of(group), group)
    if not found:
        raise ValueError("process_group is an empty list; pass the groups, or leave it out")
    return ProcessGroups([group for ranks, group in found.items() if len(ranks) > 1])


def _flattened(given: Any) -> Iterator[Any]:
    if given is None or given is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group is a group that this rank is not in (new_group returns that "
            "to ranks outside); pass, on each rank, the group that it is in"
        )
    if isinstance(given, dist.ProcessGroup):
        if dist.get_rank(given) < 0:
            raise ValueError(
                f"process_group is {named(given)}, which this rank {dist.get_rank()} is not in; "
                "pass, on each rank, the group that it is in"
            )
        yield given
    elif dist.is_available() and hasattr(given, "get_coordinate"):  # importing DeviceMesh is slow
        if given.get_coordinate() is None:
            raise ValueError(
                f"process_group is {given}, which this rank {dist.get_rank()} is not in; pass, on "
                "each rank, a mesh that it is in"
            )
        yield from groups_of(given)
    elif isinstance(given, list | tuple):
        for each in given:
            yield from _flattened(each)
    else:
        raise TypeError(
            f"process_group={given!r} is a {type(given).__name__}; pass a "
            "torch.distributed.ProcessGroup, a DeviceMesh, or a list of these"
        )


def groups_of(mesh: DeviceMesh) -> tuple[ProcessGroup, ...]:
    """The groups over which, one after the other, a number is reduced over a whole mesh."""
    if mesh.get_coordinate() is None:
        return ()
    if mesh.ndim > 1:
        whole = _of_whole(mesh)
        if whole is not None:
            return (whole,)
    return tuple(mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1)


def _of_whole(mesh: DeviceMesh) -> ProcessGroup | None:
    """A group of all ranks of ``mesh``, if there is one that takes its tensors."""
    ranks = sorted(mesh.mesh.flatten().tolist())
    group = dist.group.WORLD
    if len(ranks) == dist.get_world_size() and group is not None:
        return group if mesh.device_type in _device_types(group) else None
    root = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    for flat in getattr(root, "_flatten_mapping", {}).values():
        if flat.ndim == 1 and sorted(flat.mesh.flatten().tolist()) == ranks:
            return flat.get_group()  # type: ignore[no-any-return]  # getattr's is Any
    return None


def _device_types(group: ProcessGroup) -> list[str]:
    return [device.type for device in group._device_types]


def travels_on(group: ProcessGroup, device: torch.device) -> torch.device:
    """Where a number of ``device`` is to be for ``group`` to reduce it.

    Raises:
        ValueError: the group has no backend for a GPU's number, for which the host would wait.
    """
    types = _device_types(group)
    if device.type in types or not types:
        return device
    if device.type != "cpu":
        raise ValueError(
            f"{named(group)} has backends for {types} alone, and parameters are on {device}: to "
            "reduce their norm there, each step would wait for the device; make the group with a "
            f'backend for both, such as init_process_group("cpu:gloo,{device.type}:nccl")'
        )
    return torch.device(types[0], torch.get_device_module(types[0]).current_device())


class Reduction:
    """How several numbers are reduced, each over groups of its own; those of one group at once.

    Attributes:
        rounds: each group, with the indices of the numbers that are reduced over it.
    """

    def __init__(self, groups: Sequence[Sequence[ProcessGroup]]) -> None:
        """Plan it.

        Args:
            groups: for each number, those over which it is reduced. All ranks of a group give the
                same groups in the same order.
        """
        found: dict[tuple[int, ...], tuple[ProcessGroup, list[int]]] = {}
        for index, each in enumerate(groups):
            for group in each:
                _, members = found.setdefault(ranks_of(group), (group, []))
                members.append(index)
        self.rounds = list(found.values())

    def run(self, values: Sequence[Tensor], op: Any) -> list[Tensor]:
        """Reduce ``values``, of one dtype and device, by ``dist.ReduceOp``; new tensors."""
        values = list(values)
        for group, members in self.rounds:
            parts = [values[i].reshape(-1) for i in members]
            device = travels_on(group, parts[0].device)
            packed = torch.cat(parts).to(device)
            dist.all_reduce(packed, op, group=group)
            packed = packed.to(parts[0].device)
            for i, part in zip(members, packed.split([p.numel() for p in parts]), strict=True):
                values[i] = part.view_as(values[i])
        return values

    def largest(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The maxima of floating-point ``values``; NaN where one is, which backends may lose."""
        if not self.rounds:
            return list(values)
        nan = [v.isnan() for v in values]
        both = [
            torch.stack([v.masked_fill(n, -torch.inf), n.to(v.dtype)])
            for v, n in zip(values, nan, strict=True)
        ]
        found = self.run(both, dist.ReduceOp.MAX)
        return [most.masked_fill(is_nan > 0, torch.nan) for most, is_nan in found]
