"""Record what an optimizer's step does to one parameter, and make a program of it.

The optimizer's own, unmodified step runs on a *shadow*: an object of its class with its
hyperparameters, one tiny parameter and ``foreach=False, fused=False``. A ``TorchDispatchMode`` sees
the operations: those on tensors of the parameter's shape are the program, the Python numbers in
them are this step's scalars. A step that does the same again costs only the recording, in which
a replay runs no operation, so hyperparameters may change at every step and Python takes whatever
branch it takes.

Where step counts are to stay on a device, they are operands too, 0-dim ones: the step runs with
``capturable=True`` on fake tensors, which have no values that Python could ask for.

Refused are operations that are not pointwise, for a shadow's sum is not its parameter's, and steps
that differ between shadows of different shapes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from compileclip.recording.pointwise_ops import is_pointwise
from compileclip.recording.shadow import ChangedError, NotPointwiseError, Shadow
from compileclip.recording.warning_steps import unwarned

ATEN = torch.ops.aten
CONSTANTS = {ATEN.pow.Tensor_Scalar, ATEN.pow_.Scalar}  # another exponent is another operation


@dataclass(frozen=True)
class Call:
    """One operation of a step.

    ``leaves`` has an entry for each argument, those in lists one by one: the operand's number, or
    ``SCALAR``, or ``(value,)`` of a constant. The last of them are keywords, called ``names``.
    """

    func: OpOverload
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    out: int


SCALAR = "scalar"


@dataclass
class Recording:
    """A step's operations.

    Attributes:
        calls: the operations, with operands by number; equal for steps that do the same.
        before: the number of each operand that there was before the step.
        after: the number of the tensor that each operand is after the step, new state included.
        scalars: the floats of this step.
        counts: of the operands before the step, the dtypes of those that are 0-dim.
        tensors: per call, the shadow's own tensors: its leaves (None where no operand) and result.
    """

    calls: list[Call] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    scalars: list[float] = field(default_factory=list)
    counts: dict[str, torch.dtype] = field(default_factory=dict)
    tensors: list[tuple[tuple[Tensor | None, ...], Tensor]] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for steps of which one program can be made."""
        return tuple(self.calls), tuple(self.after.items()), tuple(self.counts.items())


def record(shadow: Shadow, group: Mapping[str, Any], others: Mapping[str, Any]) -> Recording:
    """Run the shadow's step and record it.

    Raises:
        NotPointwiseError: the step does something that is no pointwise operation.
    """
    recorder = _Recorder(shadow.operands)
    with unwarned() if shadow.is_foreign else nullcontext(), shadow.values(), recorder:
        shadow.step(group, others)
    return recorder.finish(shadow)


def replay(
    shadow: Shadow, recording: Recording, group: Mapping[str, Any], others: Mapping[str, Any]
) -> list[float]:
    """Run the shadow's step without its operations, to learn the scalars of this step.

    Raises:
        ChangedError: the step does not do what was recorded.
    """
    mode = _Replay(recording)
    with shadow.values(), mode:
        shadow.step(group, others)
    return mode.finish()


class _Recorder(TorchDispatchMode):
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.recording = Recording()
        self._shape = tensors["param"].shape
        self._numbers: dict[int, int] = {}
        # Made on a parameter's device in whose place nothing has values, each with its version.
        self._filled: dict[int, tuple[Tensor, int, float]] = {}
        for name, tensor in tensors.items():
            self.recording.before[name] = self._number(tensor)
            if tensor.dim() == 0:
                self.recording.counts[name] = tensor.dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotPointwiseError(f"{func} draws random numbers")
        if func is ATEN.scalar_tensor.default:
            return _with_value(args[0], kwargs)
        leaves = list(_leaves(args, kwargs or {}))
        mine = [isinstance(a, Tensor) and _storage(a) in self._numbers for a in leaves]
        out = func(*args, **(kwargs or {}))
        if func is ATEN.full.default and out.is_meta and out.dim() == 0:
            self._filled[_storage(out)] = (out, out._version, args[1])
        if not any(mine) and not (isinstance(out, Tensor) and out.shape == self._shape):
            return out  # on the host: step counts and what is computed of them
        if func is torch.ops.prim.device.default:
            return out  # which a fake tensor is asked for
        if not is_pointwise(func):
            raise NotPointwiseError(f"{func} is not pointwise")
        counts_alone = all(a.dim() == 0 for a, m in zip(leaves, mine, strict=True) if m)
        shapes = (self._shape, ()) if counts_alone else (self._shape,)
        if not isinstance(out, Tensor) or out.shape not in shapes:
            raise NotPointwiseError(f"{func} changes the shape")
        found = [self._leaf(func, a, m) for a, m in zip(leaves, mine, strict=True)]
        tensors = tuple(a if m else None for a, m in zip(leaves, mine, strict=True))
        self.recording.calls.append(
            Call(func, tuple(found), tuple(kwargs or ()), self._number(out))
        )
        self.recording.tensors.append((tensors, out))
        return out

    def _leaf(self, func: OpOverload, leaf: Any, mine: bool) -> Any:
        if mine:
            if leaf.shape not in (self._shape, ()):
                raise NotPointwiseError(f"{func} takes a part of a tensor")
            return self._number(leaf)
        if func in CONSTANTS or not _is_number(leaf):
            if isinstance(leaf, Tensor):
                raise NotPointwiseError(f"{func} takes a tensor that is no state")
            return (leaf,)
        self.recording.scalars.append(self._value(leaf))
        return SCALAR

    def _value(self, leaf: Any) -> float:
        """The value of a number, or of a 0-dim tensor that is not the step's own."""
        if not isinstance(leaf, Tensor) or _storage(leaf) not in self._filled:
            return _number_of(leaf)
        tensor, version, number = self._filled[_storage(leaf)]
        if leaf._version != version:
            raise NotPointwiseError("the step changes a number on a parameter's device")
        return _number_of(_with_value(number, {"dtype": tensor.dtype}))

    def _number(self, tensor: Tensor) -> int:
        return self._numbers.setdefault(_storage(tensor), len(self._numbers))

    def finish(self, shadow: Shadow) -> Recording:
        self.recording.after = dict(self.recording.before)
        for name, value in shadow.state.items():
            if isinstance(value, Tensor) and (value.dim() > 0 or shadow.on_device):
                shape = () if name in self.recording.counts else self._shape
                if value.shape != shape:
                    raise NotPointwiseError(f"the state {name!r} has a shape of its own")
                if _storage(value) not in self._numbers:
                    raise NotPointwiseError(f"the state {name!r} is not computed from operands")
                self.recording.after[name] = self._number(value)
        return self.recording


class _Replay(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Dynamo never sees it; the wrapper that keeps Dynamo out doubles the time

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.scalars: list[float] = []
        self._expected = list(zip(recording.calls, recording.tensors, strict=True))
        self._next = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._next < len(self._expected):
            call, (tensors, out) = self._expected[self._next]
            if func is call.func and self._matches(call, tensors, args, kwargs):
                self._next += 1
                return out
        if func is ATEN.scalar_tensor.default:
            return _with_value(args[0], kwargs)
        leaves = [a for a in _leaves(args, kwargs or {}) if isinstance(a, Tensor)]
        if any(a.dim() > 0 for a in leaves):
            raise ChangedError
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() > 0:
            raise ChangedError
        return result

    def _matches(
        self, call: Call, tensors: tuple[Tensor | None, ...], args: tuple[Any, ...], kwargs: Any
    ) -> bool:
        start = len(self.scalars)
        leaves = _leaves(args, kwargs) if kwargs or any(isinstance(a, list) for a in args) else args
        for leaf, kind, tensor in zip(leaves, call.leaves, tensors, strict=False):
            if tensor is not None:
                same = leaf is tensor
            elif kind is SCALAR:
                same = True
                self.scalars.append(_number_of(leaf))
            else:
                same = leaf is kind[0] or leaf == kind[0]
            if not same:
                del self.scalars[start:]
                return False
        return True

    def finish(self) -> list[float]:
        """The scalars of a step that did all that was expected."""
        if self._next < len(self._expected):
            raise ChangedError
        return self.scalars


def is_same(recording: Recording, other: Recording) -> bool:
    """Whether two steps did the same, with the same scalars to the bit."""
    numbers = [array("d", each.scalars).tobytes() for each in (recording, other)]
    done = (recording.calls, recording.after) == (other.calls, other.after)
    return done and numbers[0] == numbers[1]


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, list | tuple):
            yield from argument
        else:
            yield argument


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_number(leaf: object) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.dim() == 0 and not leaf.is_complex()
    return isinstance(leaf, int | float) and not isinstance(leaf, bool)


def _with_value(number: float, kwargs: Mapping[str, Any] | None) -> Tensor:
    """What torch makes of a number beside tensors, where these are fake too."""
    dtype = (kwargs or {}).get("dtype")
    with _disable_current_modes():
        return torch.scalar_tensor(number, dtype=dtype, device="cpu")


def _number_of(leaf: Any) -> float:
    if not isinstance(leaf, Tensor):
        return float(leaf)
    if torch._C._len_torch_dispatch_stack() == 0:
        return float(leaf.item())
    with _disable_current_modes():  # one for fake tensors would not tell of others either
        return float(leaf.item())
