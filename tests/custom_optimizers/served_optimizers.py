"""Every optimizer of a package that steps from parameters alone: served, or the reason why not.

``python tests/custom_optimizers/served_optimizers.py`` prints the table, of those of
pytorch_optimizer and lion_pytorch where they are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from helpers import clone_params, params_like, set_grads
from torch import Tensor
from torch.optim import Optimizer

import compileclip

PACKAGES = ("pytorch_optimizer", "lion_pytorch")
SHAPES = [(16, 8), (8,), (3, 4, 5)]
STEPS = 7  # RAdam's kind does something else from its sixth on


@dataclass(frozen=True)
class Outcome:
    """What became of an optimizer in mode multi_tensor.

    Attributes:
        reason: why it was not served; None if it was.
        error: the largest difference from eager, relative to the largest value of its tensor.
    """

    reason: str | None
    error: float


def classes() -> Iterator[type[Optimizer]]:
    """The optimizers of the packages that there are, by name."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found = vars(importlib.import_module(package)).items()
            for _, cls in sorted(found):
                if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer:
                    yield cls


def steps_alone(cls: type[Optimizer]) -> bool:
    """Whether it can be made from parameters alone and stepped without a closure."""
    params = params_like(SHAPES)
    set_grads(params, 0)
    try:
        opt = _made(cls, params)
        for _ in range(2):
            opt.step()
    except Exception:
        return False
    return True


def outcome(cls: type[Optimizer], shapes: Any = SHAPES) -> Outcome:
    """Step it in mode multi_tensor beside eager, on the same numbers."""
    torch.manual_seed(0)
    params = params_like(shapes)
    others = clone_params(params)
    torch.manual_seed(1)
    ours = compileclip.wrap(_made(cls, params), 1.0, mode="multi_tensor")
    torch.manual_seed(1)
    theirs = compileclip.wrap(_made(cls, others), 1.0, mode="eager")
    for seed in range(STEPS):
        for opt, tensors in ((ours, params), (theirs, others)):
            set_grads(tensors, seed)
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
    why_not = ours._modes.kernels.why_not
    error = max(_error(p, q) for p, q in zip(params, others, strict=True))
    return Outcome(None if why_not is None else why_not[0], error)


def _made(cls: type[Optimizer], params: Any) -> Any:
    made: Any = cls(params)  # type: ignore[call-arg]
    if hasattr(made, "train"):
        made.train()  # schedule-free ones ask for it
    return made


def _error(ours: Tensor, theirs: Tensor) -> float:
    if torch.equal(ours, theirs):
        return 0.0
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main(names: list[str]) -> None:
    """Print the table, of all or of those named."""
    count: Counter[str] = Counter()
    for cls in classes():
        if names and cls.__name__ not in names:
            continue
        if not steps_alone(cls):
            count["not alone"] += 1
            print(f"{cls.__name__:24} not alone")
            continue
        found = outcome(cls)
        count["served" if found.reason is None else "eager"] += 1
        print(f"{cls.__name__:24} {found.error:8.1e} {found.reason or 'served'}", flush=True)
    print(dict(count))


if __name__ == "__main__":
    main(sys.argv[1:])
