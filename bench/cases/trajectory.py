"""What every row starts from, and where float64 arithmetic goes from there.

The checkpoint is what one step leaves behind. From there each row takes ``len(FACTORS)`` steps,
which are compared with the same steps in float64. Each parameter is computed by itself, by torch's
plain for-loop: the reference needs no memory for what is not kept, and shares no code with a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.cases.case import Case, free_memory
from bench.rows.optimizers import MAX_NORM

SPREAD = 0.02  # of parameters, as models initialize them: a step must show beside it in bfloat16
# Bytes per element of a checkpoint (float32) and of the reference (float64), with two states.
KEPT_BYTES = 3 * 4 + 3 * 8
# Elements of a piece: on a CPU so few that memory is used again, elsewhere so many that launches
# do not count.
PIECE = {"cpu": 2**19}
LARGE_PIECE = 2**24
# What an optimizer keeps per parameter, whatever the parameter's size.
SCALARS = {"step", "mu_product"}
State = dict[str, Tensor]


@dataclass
class Point:
    """A parameter and its state; the state holds 0-dim tensors too."""

    param: Tensor
    state: State


@dataclass
class Trajectory:
    """A case's gradients, and what its optimizer makes of them.

    Attributes:
        grads: one per parameter, as drawn.
        factors: what they are multiplied by in the steps of the check: in the first the norm is far
            above ``MAX_NORM``, in the last it is below.
    """

    case: Case
    grads: list[Tensor]
    factors: tuple[float, ...] = field(init=False)
    _coefficients: tuple[float, ...] = field(init=False)
    _kept: dict[tuple[str, int], Point] = field(default_factory=dict)

    def __post_init__(self) -> None:
        norm = self._norm(1.0)
        self.factors = (1.0, 0.5 * MAX_NORM / norm)
        norms = [norm, *[self._norm(factor) for factor in self.factors[1:]]]
        self._coefficients = tuple(min(1.0, MAX_NORM / (norm + 1e-6)) for norm in norms)
        free = free_memory(torch.device(self.case.device))
        self._keep = KEPT_BYTES * self.case.elements < free / 3

    def checkpoint(self, index: int) -> Point:
        """Parameter ``index`` after one step from where it was initialized."""
        return self._of("checkpoint", index)

    def reference(self, index: int) -> Point:
        """Parameter ``index`` in float64 after the steps of the check."""
        return self._of("reference", index)

    def grad(self, index: int, factor: float) -> Tensor:
        """The gradient of a step, a new tensor."""
        return self.grads[index].clone() if factor == 1.0 else self.grads[index] * factor

    def _of(self, what: str, index: int) -> Point:
        if (what, index) in self._kept:
            return self._kept[what, index]
        point = self._checkpoint(index) if what == "checkpoint" else self._reference(index)
        if self._keep:
            self._kept[what, index] = point
        return point

    def _checkpoint(self, index: int) -> Point:
        case, grad = self.case, self.grads[index]
        param = SPREAD * draw(case, index, stream=1)
        # Of the size that clipped gradients have, so that no state is large beside what follows.
        first = draw(case, index, stream=2)
        begin = Point(param.to(case.state_dtype), {})
        end = _steps(case, begin, [first], self._coefficients[:1])
        return Point(end.param.to(grad.dtype), end.state)

    def _reference(self, index: int) -> Point:
        start = self.checkpoint(index)
        grads = [self.grad(index, factor) for factor in self.factors]
        state = {k: v.double() if k != "step" else v for k, v in start.state.items()}
        point = Point(start.param.double(), state)
        return _steps(self.case, point, grads, self._coefficients)

    def _norm(self, factor: float) -> float:
        squares = [
            piece.double().square().sum()
            for i in range(len(self.grads))
            for piece in pieces(self.grad(i, factor))
        ]
        return math.sqrt(torch.stack(squares).sum().item())


def draw(case: Case, index: int, stream: int) -> Tensor:
    """Normal numbers for parameter ``index`` of ``case``, in its dtype; the same at each call."""
    generator = torch.Generator(case.device).manual_seed(1_000_003 * stream + index)
    return torch.randn(
        case.shapes[index], dtype=case.dtype, device=case.device, generator=generator
    )


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a part each, whose float64 copies are small."""
    views: Sequence[Tensor] = tensor.reshape(-1).split(PIECE.get(tensor.device.type, LARGE_PIECE))
    return views


def _steps(case: Case, start: Point, grads: Sequence[Tensor], coefs: Sequence[float]) -> Point:
    """Step with ``grads`` times ``coefs``, in the dtype of ``start``.

    The optimizers treat each element by itself, so it is done piece by piece: temporary results of
    a large tensor would cost more time than the arithmetic.
    """
    param = torch.empty_like(start.param)
    state: State = {}
    columns = zip(*[pieces(t) for t in (start.param, param, *grads)], strict=True)
    for index, (begin, end, *own) in enumerate(columns):
        stepped = nn.Parameter(begin.clone())
        optimizer = case.recipe.make([stepped], foreach=False)
        if start.state:
            optimizer.state[stepped] = {
                k: v.clone() if k in SCALARS else pieces(v)[index].clone()
                for k, v in start.state.items()
            }
        for grad, coefficient in zip(own, coefs, strict=True):
            stepped.grad = grad.to(begin.dtype) * coefficient
            optimizer.step()
        end.copy_(stepped.detach())
        for k, v in optimizer.state[stepped].items():
            if k in SCALARS:
                state[k] = v
            else:
                pieces(state.setdefault(k, torch.empty_like(param)))[index].copy_(v)
    return Point(param, state)
