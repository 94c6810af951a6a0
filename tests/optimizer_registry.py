"""The optimizers that tests sweep over: one row each, and functions that make parameters of rows.

A row says how an optimizer is made and what is expected of it; ``test_optimizer_registry.py`` holds
that against torch and against what a step does. A sweep chooses rows by name, or by what they say,
and adds what is its own, such as the learning rate: ``makers(names(where), lr=0.1, fused=True)``.
``torch_inputs`` expands the list that torch itself tests with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.testing._internal.common_optimizers import optim_db

Maker: TypeAlias = Callable[..., Optimizer]

# Of mode="inductor" beside eager, relative to 1 + |value|. Inductor keeps half precision in float32
# between operations where eager rounds, and contracts products and sums. Observed over the sweep:
# 7.7e-7 in float32 (RAdam), 1.5e-2 in bfloat16 (Adafactor, RMSprop). Bitwise in float32: Rprop, 7
# of 9 inputs of SGD, 5 of 7 of ASGD; in bfloat16: 5 of 9 of SGD, 4 of 7 of ASGD.
INDUCTOR = {torch.float32: 3e-6, torch.bfloat16: 4e-2}
# Of a training step in one graph, forward and backward included. Observed: 2e-6.
ONE_GRAPH = 1e-4


@dataclass(frozen=True)
class Entry:
    """An optimizer of torch's own, as tests make it, and what is expected of it.

    Attributes:
        name: its class, and what is special.
        cls: its class.
        kwargs: what is special.
        mode: what ``mode="auto"`` takes for it, on a CPU and on a GPU.
        capturable: whether its class knows ``capturable``, so that step counts can stay on a GPU.
        decides: whether a GPU's kernels can find out that a step does not count, without
            ``capturable`` too.
        has_formula: whether the scalars of a step are found without the optimizer's own step.
        programs: how many programs eight steps are.
        roots: whether it takes square roots, which ATen's float32 ones on a CPU round otherwise.
        needs: "matrices", if it steps with nothing else; "cuda", if it makes tensors on the way, so
            that its step on a GPU cannot be recorded by a torch without CUDA.
        inductor: how far mode="inductor" may be from eager, by dtype.
        one_graph: how far a training step in one graph may be, in float32.
    """

    name: str
    cls: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "multi_tensor"
    capturable: bool = True
    decides: bool = True
    has_formula: bool = True
    programs: int = 1
    roots: bool = True
    needs: str = ""
    inductor: Mapping[torch.dtype, float] = field(default_factory=lambda: INDUCTOR)
    one_graph: float = ONE_GRAPH

    @property
    def is_plain(self) -> bool:
        """Whether it is made with its class's defaults."""
        return not self.kwargs

    @property
    def is_served(self) -> bool:
        return self.mode == "multi_tensor"

    def make(self, params: Any, **options: Any) -> Any:
        """The optimizer; ``options`` come before the row's own."""
        return self.cls(params, **{**self.kwargs, **options})

    def is_fused_on(self, device: str) -> bool:
        """Whether this torch has a fused kernel for it."""
        return device in info_of(self).supports_fused_on


_SGD: dict[str, Any] = {"capturable": False, "roots": False}
_ADAGRAD: dict[str, Any] = {"capturable": False, "decides": False}  # asks for its count as a number
_MAKES_TENSORS: dict[str, Any] = {"has_formula": False, "roots": False, "needs": "cuda"}
_REDUCES: dict[str, Any] = {
    "mode": "eager",
    "capturable": False,
    "decides": False,
    "has_formula": False,
}
# It orthogonalizes in bfloat16 whatever the dtype: a last bit of its input may come out as 1e-3.
# Observed in float32: 7.5e-4.
_MUON: dict[str, Any] = {"inductor": dict.fromkeys(INDUCTOR, 4e-2), "one_graph": 2e-2}

_ENTRIES = (
    Entry("SGD", SGD, **_SGD),
    Entry("SGD, maximize", SGD, {"weight_decay": 0.01, "maximize": True}, **_SGD),
    # Momentum is made in the first step.
    Entry("SGD, momentum", SGD, {"momentum": 0.9}, programs=2, **_SGD),
    Entry(
        "SGD, Nesterov",
        SGD,
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        programs=2,
        **_SGD,
    ),
    Entry("SGD, dampening", SGD, {"momentum": 0.9, "dampening": 0.5}, programs=2, **_SGD),
    Entry("Adam", Adam),
    Entry("Adam, decay", Adam, {"weight_decay": 0.01}),
    Entry("Adam, amsgrad", Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    Entry("AdamW", AdamW),
    Entry("AdamW, amsgrad", AdamW, {"amsgrad": True, "maximize": True}),
    Entry("NAdam", NAdam),
    Entry("NAdam, decoupled", NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    # From its sixth step on it does something else.
    Entry("RAdam", RAdam, programs=2),
    Entry("RAdam, decay", RAdam, {"weight_decay": 0.1}, programs=2),
    Entry("RMSprop", RMSprop),
    Entry("RMSprop, centered", RMSprop, {"momentum": 0.9, "centered": True}),
    Entry("Adagrad", Adagrad, **_ADAGRAD),
    Entry("Adagrad, decay", Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1}, **_ADAGRAD),
    Entry("Adadelta", Adadelta),
    Entry("Adadelta, decay", Adadelta, {"weight_decay": 0.01}),
    Entry("Adamax", Adamax, roots=False),
    Entry("Adamax, decay", Adamax, {"weight_decay": 0.01}, roots=False),
    Entry("ASGD", ASGD, **_MAKES_TENSORS),
    # From its second step on it averages.
    Entry("ASGD, averaging", ASGD, {"lambd": 0.01, "t0": 1}, programs=2, **_MAKES_TENSORS),
    Entry("Rprop", Rprop, **_MAKES_TENSORS),
    Entry("Muon", Muon, needs="matrices", **_REDUCES, **_MUON),
    Entry("Adafactor", Adafactor, **_REDUCES),
)
OPTIMIZERS = {entry.name: entry for entry in _ENTRIES}
# torch's private getters of supported devices are found there.
MODULES = sorted({entry.cls.__module__ for entry in _ENTRIES})


def names(where: Callable[[Entry], bool]) -> list[str]:
    """The names of the rows of which ``where`` is true."""
    return [name for name, entry in OPTIMIZERS.items() if where(entry)]


def maker(name: str, **options: Any) -> Maker:
    """A function that makes the optimizer of a row, with ``options`` besides."""
    return functools.partial(OPTIMIZERS[name].make, **options)


def makers(chosen: Iterable[str], **options: Any) -> dict[str, Maker]:
    """The makers of rows by name; the name tells the options that are true, as in "SGD, fused"."""
    added = "".join(f", {option}" for option, value in options.items() if value is True)
    return {name + added: maker(name, **options) for name in chosen}


def takes(cls: Any, option: str) -> bool:
    """Whether a class has an argument of this name."""
    return option in cls.__init__.__code__.co_varnames


def for_loop(cls: Any) -> dict[str, Any]:
    """What makes an optimizer step with each parameter by itself."""
    return {"foreach": False} if takes(cls, "foreach") else {}


def info_of(entry: Entry) -> Any:
    """What torch's own list says of the class of a row."""
    return next(info for info in optim_db if info.optim_cls is entry.cls)


def is_dense(info: Any) -> bool:
    return not info.only_supports_sparse_grads


def is_served(info: Any) -> bool:
    """Whether mode="multi_tensor" serves an entry of torch's own list."""
    return is_dense(info) and OPTIMIZERS[info.name].is_served


def torch_inputs(
    where: Callable[[Any], bool] = lambda info: True, device: str = "cpu"
) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Every optimizer and input of torch's own list, and an id; LBFGS is refused by ``wrap``."""
    for info in optim_db:
        if not info.step_requires_closure and where(info):
            for i, given in enumerate(info.optim_inputs_func(device=device)):
                yield info, dict(given.kwargs), f"{info.name}-{i}"


def tensors_in(kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The arguments that are tensors, or pairs with tensors."""
    values = [v if isinstance(v, tuple) else (v,) for v in kwargs.values()]
    return [each for value in values for each in value if isinstance(each, torch.Tensor)]
