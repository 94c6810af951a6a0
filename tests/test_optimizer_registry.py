"""What the rows of ``optimizer_registry.py`` say is so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import compilations, params_like, set_grads
from optimizer_registry import MODULES, OPTIMIZERS, Entry, info_of, is_dense, takes, torch_inputs
from torch import nn

import compileclip

STEPS = 8
SHAPES = {"matrices": [(3, 4), (5, 2)]}


def stepped(entry: Entry, device: str) -> Any:
    """An optimizer after some steps in mode "auto"."""
    params = params_like(SHAPES.get(entry.needs, [(3, 4), (5,)]))
    params = [nn.Parameter(p.detach().to(device)) for p in params]
    opt = compileclip.wrap(entry.make(params, lr=0.01), 1.0)
    for seed in range(STEPS):
        set_grads(params, seed)
        opt.step()
    return opt


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mode_programs_and_formula_on_a_cpu(name: str) -> None:
    entry = OPTIMIZERS[name]
    kernels = stepped(entry, "cpu")._modes.kernels
    assert (kernels.why_not is None) == entry.is_served
    assert compilations(kernels) == (entry.programs if entry.is_served else 0)
    assert {work.formula is not None for work in kernels._works} == {entry.has_formula}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mode_on_a_gpu(name: str) -> None:
    entry = OPTIMIZERS[name]
    assert (stepped(entry, "cuda")._modes.kernels.why_not is None) == entry.is_served


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_torch_says_of_it(name: str) -> None:
    entry = OPTIMIZERS[name]
    assert entry.capturable == takes(entry.cls, "capturable")
    assert entry.is_fused_on("cpu") == (entry.cls.__name__ in ("Adam", "AdamW", "SGD", "Adagrad"))
    assert name.split(",")[0] == entry.cls.__name__ == info_of(entry).name
    assert ("," in name) != entry.is_plain


def test_every_optimizer_of_torch_has_a_plain_row() -> None:
    for info, _, _ in torch_inputs(is_dense):
        assert OPTIMIZERS[info.name].is_plain
    of_torch = {v for v in vars(torch.optim).values() if isinstance(v, type)}
    others = {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam}
    assert {entry.cls for entry in OPTIMIZERS.values()} == of_torch - others
    assert "torch.optim.adamw" in MODULES
