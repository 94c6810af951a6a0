"""The programs of torch's own optimizers, as mode="multi_tensor" hands them to a lowering."""

from __future__ import annotations

import functools
import warnings
from unittest import mock

import pytest
import torch
from optimizer_registry import maker, names
from test_multi_tensor import INPUTS
from test_optim_db import give_gradients, make
from torch.optim import Optimizer

import compileclip
from compileclip.fallback import FallbackWarning, UnsupportedError
from compileclip.lowering.cpp import cpp_kernel
from compileclip.lowering.program import Program
from compileclip.passes.insert_norm_and_scale import InsertNormAndScale
from compileclip.recording.program_builder import Kind, assemble
from compileclip.recording.recorder import record
from compileclip.recording.shadow import OnDevice, Shadow

WARM = 6  # RAdam does something else from its sixth step on, SGD from its second
_NAMES = [case.values[0].name for case in INPUTS]
# Entries of INPUTS, by their place there; and the first of each optimizer.
EVERY_INPUT = [pytest.param(i, id=case.id) for i, case in enumerate(INPUTS)]
FIRST_INPUTS = [EVERY_INPUT[_NAMES.index(name)] for name in dict.fromkeys(_NAMES)]
ADAMW = _NAMES.index("AdamW")


@functools.cache
def programs(index: int, dtype: torch.dtype) -> tuple[Program, ...]:
    """The one or two programs of ``INPUTS[index]``, all operands in ``dtype``."""
    info, kwargs = INPUTS[index].values
    found: list[Program] = []
    for steps in (0, WARM):
        opt = make(info, kwargs, dtype)
        for step in range(steps):
            give_gradients(info, opt, step)
            opt.step()
        give_gradients(info, opt, steps)
        program = captured(opt)
        if not found or str(found[0].graph) != str(program.graph):
            found.append(program)
    return tuple(found)


def captured(optimizer: Optimizer) -> Program:
    """The program of the first group's next step; nothing is compiled."""
    found: list[Program] = []

    def init(_: cpp_kernel.Kernel, program: Program) -> None:
        found.append(program)
        raise UnsupportedError("a program was all that was wanted")

    wrapped = compileclip.wrap(optimizer, 1.0, mode="multi_tensor")
    with mock.patch.object(cpp_kernel.Kernel, "__init__", init), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        wrapped.step()
    assert found, wrapped.explain()
    return found[0]


CAPTURABLE = names(lambda entry: entry.capturable and entry.is_plain and not entry.needs)


def program_on_a_gpu(name: str, dtype: torch.dtype) -> Program:
    """That of an optimizer whose step counts stay on a GPU, which also decides and unscales."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype))]
    optimizer = maker(name, lr=0.01)(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    state = optimizer.state[params[0]]
    dtypes = {"param": dtype, "grad": dtype}
    dtypes |= {k: v.dtype for k, v in state.items() if v.dim() > 0}
    counts = {k: v.dtype for k, v in state.items() if v.dim() == 0}
    there = OnDevice(torch.device("cuda"), counts, {})
    recording = record(Shadow(optimizer, dtypes, on_device=there), optimizer.param_groups[0], {})
    insert = InsertNormAndScale(norm_type=2.0)
    norm = torch.promote_types(dtype, torch.float32)
    kind = Kind(insert, norm, grad_scale=True, found_inf=True, finite=True)
    return assemble(recording, dtypes, kind)
