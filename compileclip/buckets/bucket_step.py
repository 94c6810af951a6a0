"""One bucket's part of a step, and how it learns the scalars of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import Bucket
from compileclip.buckets.pointers import Table
from compileclip.eager.unhooked_step import is_torchs_own
from compileclip.recording.program_builder import COUNT
from compileclip.recording.recorder import Recording, is_same, record, replay
from compileclip.recording.scalar_formula import Formula, kinds
from compileclip.recording.scalar_trace import ScalarTrace
from compileclip.recording.shadow import (
    HYPERPARAMETER,
    SHAPES,
    ChangedError,
    NotPointwiseError,
    OnDevice,
    Shadow,
)

if TYPE_CHECKING:
    from compileclip.multi_tensor.kernel_cache import DeviceKernels

NUMBER = (bool, int, float, type(None))  # in state
# What has been found out about steps of torch's own classes, by class and recording: that they do
# the same for other shapes, whether they can be rehearsed, and by which formula.
_known: dict[Any, bool] = {}
_formulas: dict[Any, Formula] = {}
_FORMULAS = 8  # of one bucket: more would cost more than they save


class BucketStep:
    """A bucket, what steps in its place, and what that has been seen to do.

    Attributes:
        table: the bucket's, and its addresses.
        place: the device that it is on.
        extent: its sizes, as the target's launches take them.
        resident: its table, likewise.
        shadow: steps in the place of the bucket's parameters.
        state: the leader's after the step whose scalars were last asked for.
        changes: what that step changed in the parameter group.
        elsewhere: what it changed in other groups, by their index.
        is_new: whether what that step did was not known before.
        kernels: for what it has done so far.
        formula: of its latest scalars, if that is known.
    """

    def __init__(self, optimizer: Optimizer, table: Table, place: DeviceKernels) -> None:
        self.table, self.place = table, place
        self.extent = place.target.extent(table.bucket.sizes)
        self.resident = place.target.resident(table)
        self._optimizer = optimizer
        self._kept: Bucket | None = None  # whose state the optimizer has
        self._start()

    def _start(self) -> None:
        """Know nothing yet of what the step does."""
        self._on_device = self._what_stays()
        self.shadow = self.make_shadow()
        self.state: dict[str, Any] = {}
        self.changes: dict[str, Any] = {}
        self.elsewhere: dict[int, dict[str, Any]] = {}
        self.is_new = False
        self.kernels: dict[Any, Any] = {}
        self._recordings: list[Recording] = []  # the latest last, of which the following are
        self._trace: ScalarTrace | None = None
        self.formula: Formula | None = None
        self._formulas_left = _FORMULAS if _is_closed(self._optimizer) else 0

    @property
    def bucket(self) -> Bucket:
        """The bucket."""
        return self.table.bucket

    @property
    def recording(self) -> Recording:
        """Of what the shadow did last."""
        return self._recordings[-1]

    @property
    def decides(self) -> bool:
        """Whether a kernel can tell that this step does not count, and nobody else need know.

        Known after ``scalars``.
        """
        bucket = self.bucket
        on_host = not bucket.stays and (bucket.counts or bucket.numbers)
        return not on_host and not self.changes and not self.made

    @property
    def made(self) -> dict[str, Any]:
        """What state this step makes, as a shadow has it."""
        return {k: v for k, v in self.state.items() if k not in self.bucket.known}

    def keep_state(self) -> None:
        """Let the optimizer have the state of parameters that had none, if its step makes any."""
        bucket, state = self.bucket, self._optimizer.state
        kept, self._kept = self._kept, bucket
        for p, own in zip(bucket.params, bucket.states, strict=True) if kept is not bucket else ():
            if p not in state and (own or self.shadow.has_state):
                state[p] = own

    @property
    def values(self) -> dict[str, Tensor]:
        """What stays on the device, as a program reads it."""
        if self._on_device is None:
            return {}
        names = self._on_device.hyperparameters
        given: dict[str, Tensor] = {HYPERPARAMETER + k: self._group[k] for k in names}
        return {COUNT + k: v for k, v in (self.bucket.counts | given).items()}

    def scalars(self, before: Mapping[str, Any]) -> list[float]:
        """Those of this step, in the quickest way; what the leader's tensors are then is open.

        Args:
            before: the bucket's ``values``.

        Raises:
            NotPointwiseError: the step cannot become a program.
        """
        if self.bucket.stays and self._what_stays() != self._on_device:
            self._start()
        leader, group, self.is_new = self.bucket.leader, self._group, False
        if self.formula is not None:
            try:
                scalars, self.state = self.formula.run(group, before)
                self.changes, self.elsewhere = {}, {}
                return scalars
            except ChangedError:
                pass
        scalars = self._rehearsed(group, leader, before)
        self.state, self.changes = self.shadow.state, self.shadow.changes
        self.elsewhere = self.shadow.elsewhere
        for name in self.bucket.values:
            if not isinstance(
                self.state.get(name), Tensor if name in self.bucket.counts else NUMBER
            ):
                raise NotPointwiseError(f"the state {name!r} does not stay a number")
        self.formula = self._found(scalars, before)
        return scalars

    def _rehearsed(
        self, group: dict[str, Any], leader: dict[str, Any], before: Mapping[str, Any]
    ) -> list[float]:
        """Those that the optimizer's own step finds."""
        if self._trace is not None:
            try:
                return self._trace.run(group, leader)
            except ChangedError:
                restore(leader, before)
        if self._recordings:
            try:
                return replay(self.shadow, self.recording, group, leader)
            except ChangedError:
                restore(leader, before)
        recording = record(self.shadow, group, leader)
        self._remember(recording, before)
        self._trace = self._rehearse(before)
        return recording.scalars

    def _found(self, scalars: list[float], before: Mapping[str, Any]) -> Formula | None:
        """The formula of the latest recording, if it finds ``scalars`` and the state after them."""
        if self._trace is None or not self._formulas_left:
            return None
        self._formulas_left -= 1
        try:
            others = tensors(self.bucket.leader, before)
            key = (self._key(self.recording), kinds(self._group))
            formula = _formulas.get(key) or Formula(self._trace, self._group, others)
            found = formula.run(self._group, before)
        except ChangedError:
            return None
        after = {name: self.state[name].item() for name in others}
        if found != (scalars, after):
            return None
        return _formulas.setdefault(key, formula)

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self._optimizer.param_groups[self.bucket.group]
        return group

    def make_shadow(self, shape: tuple[int, ...] = SHAPES[0], like: Tensor | None = None) -> Shadow:
        """One of the bucket; see ``Shadow``."""
        dtypes, index = self.bucket.dtypes, self.bucket.group
        return Shadow(self._optimizer, dtypes, shape, self._on_device, index, like)

    def _what_stays(self) -> OnDevice | None:
        bucket = self.bucket
        if not bucket.stays:
            return None
        device = bucket.params[0].device
        counts = {name: buffer.dtype for name, buffer in bucket.counts.items()}
        tensors = {k: v for k, v in self._group.items() if isinstance(v, Tensor) and v.dim() == 0}
        there = {k: v.dtype for k, v in tensors.items() if v.device == device}
        return OnDevice(device, counts, there)

    def _remember(self, recording: Recording, before: Mapping[str, Any]) -> None:
        """Put ``recording`` last, as the known one if it is not new."""
        for known in self._recordings:
            if (known.calls, known.after) == (recording.calls, recording.after):
                self._recordings.remove(known)
                self._recordings.append(known)
                return
        if self._key(recording) not in _known:
            twin = self.make_shadow(SHAPES[1])
            other = record(twin, self._group, tensors(self.bucket.leader, before))
            if not is_same(other, recording):
                raise NotPointwiseError("the step depends on a parameter's shape")
        self._recordings.append(recording)
        self.is_new = True

    def _rehearse(self, before: Mapping[str, Any]) -> ScalarTrace | None:
        """That of the latest recording, if it finds the same scalars."""
        key = self._key(self.recording)
        known = _known.get(key)
        if known is None:
            known = self._can_be_rehearsed(before)
            if _is_closed(self._optimizer):
                _known[key] = known
        return ScalarTrace(self.shadow, self.recording) if known else None

    def _can_be_rehearsed(self, before: Mapping[str, Any]) -> bool:
        shadow = self.make_shadow()
        recording = record(shadow, self._group, tensors(self.bucket.leader, before))
        rehearsal = ScalarTrace(shadow, recording)
        try:
            found = rehearsal.run(self._group, tensors(self.bucket.leader, before))
        except ChangedError:
            return False
        return found == recording.scalars

    def _key(self, recording: Recording) -> Any:
        """Equal for steps of torch's own of which the same is known."""
        return type(self._optimizer), recording.key


def scalars_of(
    optimizer: Optimizer, works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]
) -> list[list[float]]:
    """The scalars of a step of ``optimizer``, those of each bucket.

    Args:
        optimizer: whose buckets these are.
        works: all of its buckets.
        saved: the ``values`` of their buckets.
    """
    return [work.scalars(before) for work, before in zip(works, saved, strict=True)]


def _is_closed(optimizer: Optimizer) -> bool:
    """Whether its step is known to depend on its group and state alone."""
    return is_torchs_own(optimizer) and type(optimizer).__module__.startswith("torch.optim.")


def restore(leader: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Write the values of ``before`` back to the tensors of ``leader``."""
    for name, value in before.items():
        if isinstance(leader[name], Tensor):
            leader[name].fill_(value)


def restore_all(works: Sequence[BucketStep], saved: Sequence[Mapping[str, Any]]) -> None:
    """Write the values of each bucket before a step back."""
    for work, before in zip(works, saved, strict=True):
        restore(work.bucket.leader, before)


def tensors(leader: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors like those of ``leader`` with the values of ``before``."""
    return {
        k: torch.full_like(v, before[k]) if isinstance(v, Tensor) else before[k]
        for k, v in leader.items()
    }


def extend(works: Sequence[BucketStep]) -> None:
    """Allocate the state that this step makes, all of it or none."""
    tables = [work.table for work in works]
    news = [work.made for work in works]
    try:
        for work, made in zip(works, news, strict=True):
            if made:
                work.table = work.table.extended(work.bucket.extended(made))
                work.resident = work.place.target.resident(work.table)
    except BaseException:
        for work, table, names in zip(works, tables, news, strict=True):
            work.table = table
            for state in table.bucket.states:
                for name in names:
                    state.pop(name, None)
        raise
