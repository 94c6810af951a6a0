"""How half precision is rounded on a GPU: two elements at a time, and roots by an approximation."""

from __future__ import annotations

import re

import pytest
import torch
from lowering_operations import CASES, one_operation
from lowering_programs import run_eager
from torch import Tensor

pytest.importorskip("triton")
from optimizer_programs import ADAMW, programs
from test_lowering_triton import launch
from triton_runs import INTERPRETED
from triton_targets import compile_program

if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

HALF = [torch.bfloat16, torch.float16]


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def test_an_approximate_root_rounds_to_the_same_bfloat16() -> None:
    """PTX promises 2**-23 of the value; here it may be off by eight times as much."""
    x = every_number(torch.bfloat16)
    roots = x[x >= 0].double().sqrt()
    exact = roots.float().to(torch.bfloat16)
    for error in (2.0**-20, -(2.0**-20)):
        assert torch.equal((roots * (1 + error)).float().to(torch.bfloat16), exact)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_number_is_rounded_alone(dtype: torch.dtype, target: str) -> None:
    """The instruction that rounds one at a time runs at an eighth of the rate."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    code = compile_program(target, one_operation(CASES["addcmul"], dtype))
    assert code.text.count(f"cvt.rn.{kind}x2.f32") == 2 * 4  # the full block and the tail
    assert f"cvt.rn.{kind}.f32" not in code.text


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "most"),
    # Rounded one at a time: 45.25 of either, where a division and a root count as one instruction
    # each; of float16 they are written out, for these have branches.
    [(torch.float32, 24.5), (torch.bfloat16, 31.0), (torch.float16, 64.0)],
    ids=str,
)
def test_instructions_for_an_element_of_adamw(dtype: torch.dtype, most: float, target: str) -> None:
    (made,) = programs(ADAMW, dtype)
    block = compile_program(target, made).widest.text  # 8 elements for each thread
    lines = re.findall(r"^\s+(?:@!?%p\d+\s+)?[a-z][\w.]*[^:\n]*;", block, re.MULTILINE)
    print(f"observed {len(lines) / 8}")
    assert len(lines) / 8 <= most


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["sqrt", "reciprocal", "neg", "abs", "pow 2", "pow 3", "pow -2"])
def test_every_number(name: str, dtype: torch.dtype) -> None:
    made, x = one_operation(CASES[name], dtype), every_number(dtype).cuda()
    tensors = {"x": x, "y": x.clone(), "z": x.clone(), "out": torch.zeros_like(x)}
    expected = run_eager(made, tensors, {"s": 0.1}, exact_sqrt=False)["out"]
    launch(made, {k: [t] for k, t in tensors.items()}, {"s": 0.1}, {})
    found = tensors["out"]
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))
