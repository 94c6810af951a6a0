"""The program of every input of torch's optimizer list as a Triton kernel, against eager.

On a GPU bit by bit; without one in Triton's interpreter, see test_lowering_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from lowering_programs import run_eager
from optimizer_programs import EVERY_INPUT, FIRST_INPUTS, programs
from test_lowering_triton import launch
from triton_runs import INTERPRETED, device, passed_in_the_interpreter

from compileclip.lowering.program import Program, dtype_of
from compileclip.lowering.triton.triton_kernel import BLOCK

__all__ = ["device"]  # a fixture
SIZES = [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5]
# In the interpreter, without a fused multiply-add and with scalars in float32, of the largest
# value; observed: 1.8e-7 and 3.8e-16.
CLOSE = {torch.float32: 3e-7, torch.float64: 6e-16}


def numbers(made: Program) -> dict[str, float]:
    """A number per scalar, each a float32; those that bound a clamp are in their order."""
    return {n.name: (i + 5) / 32 for i, n in enumerate(made.scalars)}


def operands(made: Program, device: str) -> dict[str, list[Tensor]]:
    """Of both signs but for state, whose roots are taken and which is divided by."""
    rows = {}
    for node in made.operands:
        low = -1.0 if node.name in ("param", "grad") else 0.25
        tensors = [torch.empty(s, dtype=torch.float64).uniform_(low, 1.0) for s in SIZES]
        rows[node.name] = [t.to(dtype_of(node)).to(device) for t in tensors]
    return rows


def check(index: int, dtype: torch.dtype, device: str) -> None:
    for made in programs(index, dtype):
        scalars, rows = numbers(made), operands(made, device)
        given = {"norm": 3.75, "max_norm": 1.5}
        values = {
            n.name: torch.tensor(given[n.name], dtype=dtype_of(n), device=device)
            for n in made.values
        }
        expected = [
            run_eager(
                made, {k: row[i] for k, row in rows.items()}, scalars, values, device == "cpu"
            )
            for i in range(len(SIZES))
        ]
        launch(made, rows, scalars, values)
        for name in made.stored:
            for actual, stored in zip(rows[name], expected, strict=True):
                wanted = stored[name]
                assert wanted.isfinite().all()
                close = CLOSE[dtype] * wanted.abs().max().item() if INTERPRETED else 0.0
                torch.testing.assert_close(actual, wanted, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("index", FIRST_INPUTS)
def test_program(index: int, dtype: torch.dtype, device: str) -> None:
    check(index, dtype, device)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("index", EVERY_INPUT)
def test_every_program(index: int, dtype: torch.dtype, device: str) -> None:
    check(index, dtype, device)


def test_in_the_interpreter() -> None:
    """The first of the tests above."""
    assert passed_in_the_interpreter(__file__) == 2 * len(FIRST_INPUTS)


@pytest.mark.sweep
def test_every_program_in_the_interpreter() -> None:
    assert passed_in_the_interpreter(__file__, "-m", "sweep") == 2 * len(EVERY_INPUT)
