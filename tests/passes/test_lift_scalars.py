"""Calls with floats that vary, as code may write them: values, dtypes and how often compiled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule, Node

from compileclip.passes.lift_scalars import LiftScalars

Function = Callable[..., Any]

X, Y, Z = (torch.linspace(0.5, 2, 7) + i for i in range(3))
INTS, HALF, DOUBLE = torch.arange(7), X.bfloat16(), X.double()
SCALAR, OTHER = torch.tensor(1.5), torch.tensor(2.5)

# Of a float s and an int n, both of which vary. Compiled twice: constants, then variables.
LIFTED: dict[str, Function] = {
    "lerp_, swapped keywords": lambda s, n: X.clone().lerp_(weight=s, end=Y),
    "full_like": lambda s, n: torch.full_like(X, s),
    "full_like, keyword": lambda s, n: torch.full_like(X, fill_value=s),
    "full_like, float64": lambda s, n: torch.full_like(X, s, dtype=torch.float64),
    "full_like, of ints in float64": lambda s, n: torch.full_like(INTS, s, dtype=torch.float64),
    "mul, keyword": lambda s, n: torch.mul(X, other=1 - s),
    "mul, keywords": lambda s, n: torch.mul(input=X, other=s),
    "pow, keyword": lambda s, n: torch.pow(s, exponent=X),
    "pow, of ints": lambda s, n: s**INTS,
    "add, keywords": lambda s, n: X.add(alpha=s, other=Y),
    "add, ints to halves": lambda s, n: HALF.add(INTS, alpha=s),
    "add, a half to floats": lambda s, n: X.clone().add_(HALF / 3, alpha=s),
    "add, 0-dim float64": lambda s, n: X.add(SCALAR.double(), alpha=s),
    "addcmul, mixed dtypes": lambda s, n: DOUBLE.addcmul(X, HALF, value=s),
    "addcdiv, 0-dim": lambda s, n: SCALAR.addcdiv(OTHER, OTHER + 1, value=s),
    "foreach mul, 0-dim": lambda s, n: torch._foreach_mul([SCALAR], s),
    "foreach mul, keyword": lambda s, n: torch._foreach_mul([X, SCALAR, INTS, HALF], scalar=s),
    "foreach div, 0-dim": lambda s, n: torch._foreach_div([SCALAR, X], s),
    "foreach mul, ints": lambda s, n: torch._foreach_mul([INTS], s),
    "foreach div, ints": lambda s, n: torch._foreach_div([INTS, INTS], s),
    "foreach mul, float64": lambda s, n: torch._foreach_mul([DOUBLE, X, SCALAR], s),
    "foreach mul_, 0-dim half": lambda s, n: in_place(torch._foreach_mul_, [SCALAR.half(), X], s),
    "foreach add, 0-dim": lambda s, n: torch._foreach_add([X, SCALAR], [Y, OTHER], alpha=s),
    "foreach add, mixed dtypes": lambda s, n: torch._foreach_add([X, X], [HALF, DOUBLE], alpha=s),
    "foreach addcmul_, 0-dim": lambda s, n: in_place(
        torch._foreach_addcmul_, [SCALAR], [OTHER], [OTHER], value=s
    ),
    "foreach add of a number": lambda s, n: torch._foreach_add([X, SCALAR], s),
    "foreach sub of a number": lambda s, n: torch._foreach_sub([X, HALF], s),
    "foreach pow, 0-dim": lambda s, n: torch._foreach_pow(s, [SCALAR, X]),
    "power of an int": lambda s, n: X * (1 - s**n),
    "Adam's step size": lambda s, n: X.add(Y, alpha=-s * math.sqrt(1 - s**n) / (1 - s**n)),
}

# What stays as it was, so that torch compiles it anew for each value.
LEFT: dict[str, Function] = {
    "full_like, ints": lambda s, n: torch.full_like(INTS, 5 * s),
    "pow, keyword exponent": lambda s, n: torch.pow(X, exponent=s),
    "foreach mul, 0-dim half": lambda s, n: torch._foreach_mul([SCALAR.bfloat16()], s),
    "foreach mul, list": lambda s, n: torch._foreach_mul([X, Y], [s, 2 * s]),
}

# Uses of one float, of which some can stay variable and some cannot.
MIXED: dict[str, Function] = {
    "clamp and a lifted call": lambda s, n: X.clamp(max=s) + X.add(Y, alpha=s),
    "clamp and a product": lambda s, n: X.clamp(max=s) + X * s,
    "product and power": lambda s, n: X * s + X ** (1 - s),
    "what is computed of it": lambda s, n: X.clamp(max=2 * s) + X.add(Y, alpha=s * n),
    "round": lambda s, n: X.add(Y, alpha=s) * round(s, 1),
    "remainder": lambda s, n: X.add(Y, alpha=s % 0.3) + X * s,
    "its integer part": lambda s, n: X.add(Y, alpha=s) + int(10 * s),
    "given back": lambda s, n: (X.add(Y, alpha=s), 2 * s),
    "product in disguise": lambda s, n: torch.mul(X, s, out=torch.empty(7)) + X.clamp(max=s),
    "alpha beside it": lambda s, n: X.add(s, alpha=2) + X * s,
}


def in_place(function: Function, xs: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    copies = [x.clone() for x in xs]
    function(copies, *args, **kwargs)
    return copies


def assert_equal(ours: Any, theirs: Any, name: str) -> None:
    half = "half" in name or "halves" in name
    torch.testing.assert_close(
        ours, theirs, msg=lambda m: f"{name}: {m}", **({"rtol": 1e-2, "atol": 1e-2} if half else {})
    )


def compiled_in_eager(function: Function, name: str) -> int:
    """Compare with eager over values of both numbers; how often compiled."""
    compilations = 0

    def backend(module: GraphModule, inputs: Any) -> Any:
        nonlocal compilations
        before = [n for n in module.graph.nodes if n.op != "output"]
        LiftScalars()(module.graph)
        assert_complete(module, before)
        module.recompile()
        result = torch._dynamo.lookup_backend("aot_eager_decomp_partition")(module, inputs)
        compilations += 1
        return result

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for i in range(5):
        assert_equal(compiled(0.9 - 0.15 * i, 2 + i), function(0.9 - 0.15 * i, 2 + i), name)
    return compilations


def assert_complete(module: GraphModule, before: list[Node]) -> None:
    """New nodes say what they stand for, and each of them is used or acts in place."""
    for node in set(module.graph.nodes) - set(before):
        if node.op != "output":
            assert "example_value" in node.meta, node
            name = getattr(node.target, "__name__", str(node.target))
            assert node.users or name.endswith("_"), node
    module.graph.lint()


@pytest.mark.parametrize("name", LIFTED)
def test_lifted(name: str) -> None:
    assert compiled_in_eager(LIFTED[name], name) == 2


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    assert compiled_in_eager(LEFT[name], name) == 5


def test_foreach_lerp_of_a_scalar() -> None:
    """Dynamo takes it apart; torch 2.13 into what the pass does not lift."""

    def lerp(s: float, n: int) -> list[Tensor]:
        return in_place(torch._foreach_lerp_, [SCALAR, X], [OTHER, Y], s)

    assert compiled_in_eager(lerp, "foreach lerp_") in (2, 5)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_uses(name: str) -> None:
    assert compiled_in_eager(MIXED[name], name) >= 5


@pytest.mark.parametrize("name", MIXED)
def test_mixed_uses_are_not_taken_from_inductors_cache(name: str) -> None:
    """The caches know a graph by its inputs: a baked value must not be served for the next one."""
    torch._dynamo.reset()
    compiled = torch.compile(MIXED[name], backend="compileclip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        for s in (1.0, 0.9, 0.8, 0.7):
            assert_equal(compiled(s, 2), MIXED[name](s, 2), name)


@pytest.mark.parametrize("cases", [LIFTED, LEFT], ids=["lifted", "left"])
def test_inductor_without_a_warning(cases: dict[str, Function]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, n: [f(s, n) for f in cases.values()], backend="compileclip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        for s, n in ((0.9, 2), (0.8, 3), (0.7, 4)):
            for name, result in zip(cases, compiled(s, n), strict=True):
                assert_equal(result, cases[name](s, n), name)


class StepInAnInt(torch.optim.Optimizer):
    """Adam as third parties write it: the step count is a number of Python."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, (b1, b2) = self.state[p], group["betas"]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                state["m"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["v"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
                p.addcdiv_(state["m"], state["v"].sqrt().add_(1e-8), value=-group["lr"] * size)


def test_a_third_party_optimizer_that_counts_in_python() -> None:
    ours, theirs = (StepInAnInt([torch.nn.Parameter(X.clone())]) for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(ours.step, backend="compileclip")
    for i in range(8):
        for opt, run in ((ours, step), (theirs, theirs.step)):
            group = opt.param_groups[0]
            group["params"][0].grad = Y + i
            run()
            group["lr"] *= 0.9
            group["betas"] = (group["betas"][0] * 0.97, group["betas"][1] * 0.99)
    torch.testing.assert_close(ours.param_groups[0]["params"], theirs.param_groups[0]["params"])
    assert counters["stats"]["unique_graphs"] <= 3
