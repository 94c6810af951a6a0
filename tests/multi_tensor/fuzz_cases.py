"""Random models, gradients and events for the fuzzing of mode="multi_tensor"."""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import strategies as st
from optimizer_registry import makers, names
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer
from torch.torch_version import TorchVersion

MAKERS = makers(names(lambda entry: entry.is_served), lr=0.1, foreach=False)
EXACT = (torch.float32, torch.float64)
DTYPES = (*EXACT * 4, torch.bfloat16, torch.float16)
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple) | st.sampled_from(
    [(16383,), (16384,), (16385,), (130, 127), (3, 16384), (2, 3, 4, 5), (8, 8)]
)
PARAM_LAYOUTS = ("plain", "plain", "transposed", "channels last", "misaligned", "strided")
GRAD_LAYOUTS = (
    *("plain",) * 4,
    *("transposed", "strided", "misaligned", "expanded", "reversed", "shared", "none"),
)
EVENTS = (*("nothing",) * 4, "freeze", "thaw", "load", "add a group", "replace state", "move")


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values otherwise in memory."""
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([value, value], -1)[..., 0]
    if layout == "reversed":
        order = list(range(value.dim()))[::-1]
        return value.permute(order).contiguous().permute(order)
    if layout == "misaligned":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    if layout == "expanded" and value.dim() > 0 and value.numel():
        return value[:1].expand_as(value)
    return value.clone(memory_format=torch.contiguous_format)


def random(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


class Model:
    """Parameters in two groups, some perhaps in the same memory; each call makes the same."""

    def __init__(self, data: st.DataObject) -> None:
        kinds = st.tuples(shapes, st.sampled_from(DTYPES), st.sampled_from(PARAM_LAYOUTS))
        self.kinds = data.draw(st.lists(kinds, min_size=1, max_size=6))
        self.seed = data.draw(st.integers(0, 1000))
        self.split = data.draw(st.integers(0, len(self.kinds)))
        self.name = data.draw(st.sampled_from(sorted(MAKERS)))
        # Of a parameter that is not served: test_memory_shared_with_one_that_is_not_served.
        served = self.kinds[0][2] != "strided"
        self.overlap = data.draw(st.integers(0, 15)) == 0 and served

    def optimizer(self) -> Optimizer:
        generator = torch.Generator().manual_seed(self.seed)
        params = []
        for shape, dtype, layout in self.kinds:
            value = laid_out(random(shape, dtype, generator), layout)
            params.append(nn.Parameter(value))
        if self.overlap and params[0].dim() and params[0].numel():
            params.append(nn.Parameter(params[0].data[:1]))
        groups = [{"params": params[: self.split], "lr": 0.2}, {"params": params[self.split :]}]
        return MAKERS[self.name](groups)


def happen(event: str, which: int, opt: Optimizer, other: Optimizer, seed: int) -> None:
    """Do to ``opt`` what a user may do between two steps; ``other`` is its twin."""
    params = [p for group in opt.param_groups for p in group["params"]]
    p = params[which % len(params)]
    if event in ("freeze", "thaw"):
        p.requires_grad_(event == "thaw")
    elif event == "load":
        opt.load_state_dict(copy.deepcopy(other.state_dict()))
    elif event == "add a group" and takes_groups(opt):
        generator = torch.Generator().manual_seed(seed)
        values = [random(shape, torch.float32, generator) for shape in ((9,), (3, 3))]
        opt.add_param_group({"params": [nn.Parameter(v) for v in values], "lr": 0.05})
    elif event == "replace state":
        layout = PARAM_LAYOUTS[which % len(PARAM_LAYOUTS)]
        for name, value in opt.state.get(p, {}).items():
            opt.state[p][name] = laid_out(value, layout) if isinstance(value, Tensor) else value
    elif event == "move":
        p.data = laid_out(p.data, PARAM_LAYOUTS[which % len(PARAM_LAYOUTS)])


def takes_groups(opt: Optimizer) -> bool:
    """Whether torch's class steps with a group that is added: Adagrad does from 2.12 on."""
    stock = getattr(opt, "optimizer", opt)
    return not isinstance(stock, Adagrad) or TorchVersion(torch.__version__) >= "2.12"


def give_gradients(opt: Optimizer, layouts: list[str], seed: int) -> None:
    """Random gradients; "shared" is the one before, where that fits."""
    generator = torch.Generator().manual_seed(seed)
    before: Tensor | None = None
    params = [p for group in opt.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        layout = layouts[i % len(layouts)]
        grad: Tensor | None = laid_out(random(p.shape, p.dtype, generator), layout)
        if layout == "none" or not p.requires_grad:
            grad = None
        elif layout == "shared" and before is not None:
            same = before.shape == p.shape and before.dtype == p.dtype
            grad = before if same else grad
        p.grad = before = grad
