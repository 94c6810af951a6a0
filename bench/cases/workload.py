"""The tensors of a case: one set in memory, on which all rows step in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.cases.case import Case, check_device, check_memory
from bench.cases.trajectory import SCALARS, State, Trajectory, draw, pieces

# How far parameters and state may be from float64, beside how far the steps of the check went and
# apart from ROUNDINGS of each element. Torch sums float32 squares in float32 on a CPU (its norm was
# off by 0.07 % where a tensor had 39 million elements) and rounds the norm of bfloat16 to bfloat16
# (by 0.4 %). What is computed wrongly is off by far more.
CLOSE = {torch.float32: 3e-2, torch.bfloat16: 6e-2}
ROUNDINGS = 4  # in two steps: each multiplies by the decay, and adds; half a unit each time


@dataclass
class Difference:
    """From the reference: relative to the way gone, as it is judged; absolute, of parameters."""

    relative: float
    of: str
    absolute: float


class Workload:
    """Parameters, state and gradients of a case.

    All rows step on the same memory, so that a large model need not fit a dozen times. A row has
    its own ``Parameter`` objects and its own step counts.

    Raises:
        NotRunError: the device is not there, or too small.
    """

    def __init__(self, case: Case) -> None:
        check_fits(case)
        self.case = case
        indices = range(len(case.shapes))
        self.trajectory = Trajectory(case, [draw(case, i, stream=3) for i in indices])
        points = [self.trajectory.checkpoint(i) for i in indices]
        self.params = [point.param.clone() for point in points]
        self.state: list[State] = [
            {k: v.clone() for k, v in point.state.items() if k not in SCALARS} for point in points
        ]
        self._scalars: list[State] = [
            {k: v for k, v in point.state.items() if k in SCALARS} for point in points
        ]

    @property
    def needed_bytes(self) -> int:
        """What a step must move: the gradient twice; parameters and state once each way."""
        return sum(
            2 * p.nbytes + 2 * (p.nbytes + sum(s.nbytes for s in state.values()))
            for p, state in zip(self.params, self.state, strict=True)
        )

    def reset(self) -> None:
        """Set parameters and state back to the checkpoint, in place."""
        for i, param in enumerate(self.params):
            start = self.trajectory.checkpoint(i)
            param.copy_(start.param)
            for name, value in self.state[i].items():
                value.copy_(start.state[name])

    def reset_counts(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        """Set what ``load`` made for ``optimizer`` alone back, in place."""
        for p, scalars in zip(params, self._scalars, strict=True):
            for name, value in scalars.items():
                optimizer.state[p][name].copy_(value)

    @cached_property
    def fixed_grads(self) -> list[Tensor]:
        """Gradients that stay where they are, for steps that are captured."""
        return [torch.empty_like(p) for p in self.params]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters for a row: objects of its own over the shared memory."""
        return [nn.Parameter(p) for p in self.params]

    def load(self, optimizer: Optimizer, params: Sequence[Tensor]) -> None:
        """Have ``optimizer`` go on from the checkpoint, on the shared state."""
        group = optimizer.param_groups[0]
        on_device = group.get("fused") or group.get("capturable")
        for p, state, scalars in zip(params, self.state, self._scalars, strict=True):
            own = {k: v.clone().to(p.device if on_device else v.device) for k, v in scalars.items()}
            optimizer.state[p] = {**own, **state}

    def new_grads(self, factor: float = 1.0) -> list[Tensor]:
        """Gradients as a backward makes them: new tensors."""
        return [self.trajectory.grad(i, factor) for i in range(len(self.params))]

    def difference(
        self, params: Sequence[Tensor] | None = None, state: Sequence[State] | None = None
    ) -> Difference:
        """Compare with float64 after the steps of the check; by default the shared memory."""
        worst = Difference(0.0, "parameters", 0.0)
        found = zip(params or self.params, state or self.state, strict=True)
        for i, (param, own) in enumerate(found):
            start, end = self.trajectory.checkpoint(i), self.trajectory.reference(i)
            _compare(worst, "parameters", param, start.param, end.param)
            for name, value in own.items():
                _compare(worst, name, value, start.state[name], end.state[name])
        return worst


def _compare(worst: Difference, name: str, value: Tensor, start: Tensor, wanted: Tensor) -> None:
    rounding = ROUNDINGS / 2 * torch.finfo(value.dtype).eps
    gone = largest = beyond = 0.0
    for own, begin, end in zip(pieces(value), pieces(start), pieces(wanted), strict=True):
        if not own.numel():
            continue
        difference = (own.double() - end).abs()
        excess = (difference - rounding * end.abs()).max()
        found = torch.stack([(end - begin).abs().max(), difference.max(), excess]).tolist()
        if math.isnan(found[1]):
            found[1:] = math.inf, math.inf
        gone, largest, beyond = map(max, (gone, largest, beyond), found)
    relative = beyond / gone if gone else beyond
    if relative > worst.relative:
        worst.relative, worst.of = relative, name
    if name == "parameters":
        worst.absolute = max(worst.absolute, largest)


def check_fits(case: Case) -> None:
    """Raise ``NotRunError`` where the device of ``case`` is not there, or too small."""
    check_device(case.device)
    check_memory(case, states=_states(case))


def _states(case: Case) -> int:
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = case.recipe.make([param], foreach=False)
    optimizer.step()
    return len(optimizer.state[param].keys() - SCALARS)
