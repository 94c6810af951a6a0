"""One bucket's part of a step, and how it learns the scalars of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets import Bucket
from compileclip.capture import ChangedError, Recording, record, replay
from compileclip.eager import is_torchs_own
from compileclip.formula import Formula
from compileclip.gather import Table
from compileclip.rehearsal import Rehearsal
from compileclip.shadow import SHAPES, NotPointwiseError, Shadow

# A step that decides otherwise every few steps would cost more than it saves.
_FORMULAS = 8


class Work:
    """A bucket, what steps in its place, and what that has been seen to do.

    Attributes:
        table: the bucket's, and its addresses.
        extent: its sizes, as the target's launches take them.
        shadow: steps in the place of the bucket's parameters.
        state: the leader's after the step whose scalars were last asked for.
        changes: what that step changed in the parameter group.
        kernels: for what it has done so far.
    """

    def __init__(self, optimizer: Optimizer, table: Table, extent: Any) -> None:
        self.table, self.extent = table, extent
        self.shadow = Shadow(optimizer, table.bucket.dtypes)
        self.state: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        self.kernels: dict[Any, Any] = {}
        self._optimizer = optimizer
        self._recordings: list[Recording] = []  # the latest last
        # Both are of the latest, if that can be had.
        self._rehearsal: Rehearsal | None = None
        self._formula: Formula | None = None
        self._formulas_left = _FORMULAS if _is_closed(optimizer) else 0

    @property
    def bucket(self) -> Bucket:
        """The bucket."""
        return self.table.bucket

    @property
    def recording(self) -> Recording:
        """Of what the shadow did last."""
        return self._recordings[-1]

    def scalars(self, before: Mapping[str, Any]) -> list[float]:
        """Those of this step, in the quickest way; what the leader's tensors are then is open.

        Args:
            before: the bucket's ``values``.

        Raises:
            NotPointwiseError: the step cannot become a program.
        """
        leader, group = self.bucket.leader, self._group
        if self._formula is not None:
            try:
                scalars, self.state = self._formula.run(group, before)
                self.changes = {}
                return scalars
            except ChangedError:
                pass
        scalars = self._rehearsed(group, leader, before)
        self.state, self.changes = self.shadow.state, self.shadow.changes
        self._formula = self._found(scalars, before)
        return scalars

    def _rehearsed(
        self, group: dict[str, Any], leader: dict[str, Any], before: Mapping[str, Any]
    ) -> list[float]:
        """Those that the optimizer's own step finds."""
        if self._rehearsal is not None:
            try:
                return self._rehearsal.run(group, leader)
            except ChangedError:
                restore(leader, before)
        if self._recordings:
            try:
                return replay(self.shadow, self.recording, group, leader)
            except ChangedError:
                restore(leader, before)
        recording = record(self.shadow, group, leader)
        self._remember(recording, before)
        self._rehearsal = self._rehearse(before)
        return recording.scalars

    def _found(self, scalars: list[float], before: Mapping[str, Any]) -> Formula | None:
        """The formula of the latest recording, if it finds ``scalars`` and the state after them."""
        if self._rehearsal is None or not self._formulas_left:
            return None
        self._formulas_left -= 1
        try:
            others = tensors(self.bucket.leader, before)
            formula = Formula(self._rehearsal, self._group, others)
            found = formula.run(self._group, before)
        except ChangedError:
            return None
        after = {name: self.state[name].item() for name in others}
        return formula if found == (scalars, after) else None

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[self.bucket.group]
        return group

    def _remember(self, recording: Recording, before: Mapping[str, Any]) -> None:
        """Put ``recording`` last, as the known one if it is not new."""
        for known in self._recordings:
            if (known.calls, known.after) == (recording.calls, recording.after):
                self._recordings.remove(known)
                self._recordings.append(known)
                return
        twin = Shadow(self._optimizer, self.bucket.dtypes, SHAPES[1])
        other = record(twin, self._group, tensors(self.bucket.leader, before))
        if other.calls != recording.calls or other.scalars != recording.scalars:
            raise NotPointwiseError("the step depends on a parameter's shape")
        self._recordings.append(recording)

    def _rehearse(self, before: Mapping[str, Any]) -> Rehearsal | None:
        """That of the latest recording, if it finds the same scalars."""
        shadow = Shadow(self._optimizer, self.bucket.dtypes)
        recording = record(shadow, self._group, tensors(self.bucket.leader, before))
        rehearsal = Rehearsal(shadow, recording)
        try:
            found = rehearsal.run(self._group, tensors(self.bucket.leader, before))
        except ChangedError:
            return None
        same = found == recording.scalars
        return Rehearsal(self.shadow, self.recording) if same else None


def _is_closed(optimizer: Optimizer) -> bool:
    """Whether its step is known to depend on its parameter group and state alone."""
    return is_torchs_own(optimizer) and type(optimizer).__module__.startswith("torch.optim.")


def restore(leader: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write the values of ``before`` back to the tensors of ``leader``."""
    for name, value in before.items():
        if isinstance(leader[name], Tensor):
            leader[name].fill_(value)


def tensors(leader: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors like those of ``leader`` with the values of ``before``."""
    return {
        k: torch.full_like(v, before[k]) if isinstance(v, Tensor) else before[k]
        for k, v in leader.items()
    }
