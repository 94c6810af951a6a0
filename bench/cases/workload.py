"""The tensors of a case: one set in memory, on which all rows step in turn.

They begin at a checkpoint, which is what one step leaves behind. From there each row takes
``len(factors)`` steps, which are compared with the same steps in float64 by torch's plain for-loop.
Of a large tensor, elements at even distances are compared: the optimizers treat each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.cases.case import Case, check_device, check_memory
from bench.rows.optimizers import MAX_NORM

SPREAD = 0.02  # of parameters, as models initialize them: a step must show beside it in bfloat16
COMPARED = 2**16  # elements of a tensor, or up to twice as many
# What an optimizer keeps per parameter, whatever the parameter's size.
SCALARS = {"step", "mu_product"}
# How far parameters and state may be from float64, beside how far the steps of the check went and
# apart from ROUNDINGS of each element. Torch sums float32 squares in float32 on a CPU (its norm was
# off by 0.07 % where a tensor had 39 million elements) and rounds the norm of bfloat16 to bfloat16
# (by 0.4 %). What is computed wrongly is off by far more.
CLOSE = {torch.float32: 3e-2, torch.bfloat16: 6e-2}
ROUNDINGS = 4  # in two steps: each multiplies by the decay, and adds; half a unit each time
PARAM = "parameters"
# A parameter, by the name PARAM, and its state by the optimizer's names.
Tensors = dict[str, Tensor]


class WrongError(ArithmeticError):
    """A row computed something else."""


class Workload:
    """Parameters, state and gradients of a case.

    All rows step on the same memory, so that a large model need not fit a dozen times. A row has
    its own ``Parameter`` objects and its own step counts.

    Attributes:
        tensors: the shared memory.
        factors: what the gradients are multiplied by in the steps of the check: in the first the
            norm is far above ``MAX_NORM``, in the last it is below.
        reference: what these steps make of the compared elements, in float64.

    Raises:
        NotRunError: the device is not there, or too small.
    """

    def __init__(self, case: Case) -> None:
        check_fits(case)
        self.case = case
        indices = range(len(case.shapes))
        self._drawn = [_draw(case, i, stream=3) for i in indices]
        norm = self._norm(1.0)
        self.factors = (1.0, 0.5 * MAX_NORM / norm)
        self._coefficients = [min(1.0, MAX_NORM / (self._norm(f) + 1e-6)) for f in self.factors]
        points = [self._checkpoint(i) for i in indices]
        self._scalars = [{k: v for k, v in point.items() if k in SCALARS} for point in points]
        self._start = [{k: v for k, v in point.items() if k not in SCALARS} for point in points]
        self.tensors = [{k: v.clone() for k, v in start.items()} for start in self._start]
        self.reference = [self._exact(i) for i in indices]

    @property
    def params(self) -> list[Tensor]:
        """The shared memory of the parameters."""
        return [tensors[PARAM] for tensors in self.tensors]

    @property
    def needed_bytes(self) -> int:
        """What a step must move: the gradient twice; parameters and state once each way."""
        return 2 * sum(t[PARAM].nbytes + sum(v.nbytes for v in t.values()) for t in self.tensors)

    def reset(self) -> None:
        """Set parameters and state back to the checkpoint, in place."""
        for tensors, start in zip(self.tensors, self._start, strict=True):
            for name, value in tensors.items():
                value.copy_(start[name])

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
        for p, tensors, scalars in zip(params, self.tensors, self._scalars, strict=True):
            own = {k: v.clone().to(p.device if on_device else v.device) for k, v in scalars.items()}
            optimizer.state[p] = {**own, **{k: v for k, v in tensors.items() if k != PARAM}}

    def new_grads(self, factor: float = 1.0) -> list[Tensor]:
        """Gradients as a backward makes them: new tensors."""
        return [grad.clone() if factor == 1.0 else grad * factor for grad in self._drawn]

    def difference(self) -> float:
        """The largest of any parameter from float64, after the steps of the check.

        Raises:
            WrongError: parameters or state are further from it than roundings explain.
        """
        largest = 0.0
        for own, start, end in zip(self.tensors, self._start, self.reference, strict=True):
            for name, value in own.items():
                if not value.numel():
                    continue
                gone = (end[name] - _some(start[name])).abs().max()
                rounding = ROUNDINGS / 2 * torch.finfo(value.dtype).eps * end[name].abs()
                found = (_some(value).double() - end[name]).abs()
                if not (found <= CLOSE[value.dtype] * gone + rounding).all():
                    raise WrongError(f"by {found.max() / gone:.1e} in {name}")
                if name == PARAM:
                    largest = max(largest, found.max().item())
        return largest

    def _norm(self, factor: float) -> float:
        norms = [torch.linalg.vector_norm(g * factor, dtype=torch.float64) for g in self._drawn]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _checkpoint(self, index: int) -> Tensors:
        """Parameter ``index`` and its state after one step from where it was initialized."""
        case = self.case
        param = nn.Parameter(SPREAD * _draw(case, index, stream=1))
        optimizer = case.make_optimizer([param], foreach=False)
        # Of the size that clipped gradients have, so that no state is large beside what follows.
        param.grad = _draw(case, index, stream=2) * self._coefficients[0]
        optimizer.step()
        return {PARAM: param.detach(), **optimizer.state[param]}

    def _exact(self, index: int) -> Tensors:
        """The compared elements of parameter ``index`` after the steps of the check."""
        start = {k: _some(v).double() for k, v in self._start[index].items()}
        param = nn.Parameter(start.pop(PARAM))
        optimizer = self.case.make_optimizer([param], foreach=False)
        scalars = self._scalars[index].items()
        counts = {k: v.clone() if k == "step" else v.double() for k, v in scalars}
        optimizer.state[param] = {**start, **counts}
        for factor, coefficient in zip(self.factors, self._coefficients, strict=True):
            param.grad = (_some(self._drawn[index]) * factor).double() * coefficient
            optimizer.step()
        return {PARAM: param.detach(), **optimizer.state[param]}


def _draw(case: Case, index: int, stream: int) -> Tensor:
    """Normal numbers for parameter ``index`` of ``case``, in its dtype; the same at each call."""
    generator = torch.Generator(case.device).manual_seed(1_000_003 * stream + index)
    return torch.randn(
        case.shapes[index], dtype=case.dtype, device=case.device, generator=generator
    )


def _some(tensor: Tensor) -> Tensor:
    """The elements that are compared; at odd distances, so that they lie in all lanes of a core."""
    return tensor.reshape(-1)[:: tensor.numel() // COMPARED | 1]


def check_fits(case: Case) -> None:
    """Raise ``NotRunError`` where the device of ``case`` is not there, or too small."""
    check_device(case.device)
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    optimizer = case.make_optimizer([param], foreach=False)
    optimizer.step()
    check_memory(case, states=len(optimizer.state[param].keys() - SCALARS))
