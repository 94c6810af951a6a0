"""Where there is no C++ compiler, a GPU's steps are launched by Triton, and are as right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import params_like
from torch import nn

import compileclip
from compileclip.buckets import pointers
from compileclip.fallback import FallbackWarning
from compileclip.multi_tensor import native_step
from compileclip.native import native_build, native_tensors

pytest.importorskip("triton")
from stub_driver import Copied, Stub, stubbed

from compileclip.lowering import targets

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")


@pytest.fixture
def opt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An optimizer, two steps old; ``stub`` is the driver that Triton has."""

    def none(*_: Any) -> Any:
        raise native_build.CompilerError("there is no C++ compiler", "install g++")

    with stubbed(monkeypatch) as stub, warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "gradients come to the step")
        monkeypatch.setattr(targets.cuda_driver, "of", lambda _: None)
        for module in (native_tensors, pointers, native_step):
            monkeypatch.setattr(module, "library", none)
            if hasattr(module, "has_library"):
                monkeypatch.setattr(module, "has_library", lambda: False)
        params: list[Any] = params_like([(3, 4), (5,), (0, 2)])
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        made = compileclip.wrap(torch.optim.AdamW(groups), 1.0, mode="multi_tensor")
        made.stub = stub
        for _ in range(2):
            give(made)
            made.step()
        yield made


def give(opt: Any) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


def addresses(opt: Any) -> list[list[int]]:
    """Of gradients, as kernels find them."""
    works = opt._modes.kernels._works
    return [work.resident[work.table.grads].tolist() for work in works]


def expected(opt: Any) -> list[list[int]]:
    return [[p.grad.data_ptr() for p in work.bucket.params] for work in opt._modes.kernels._works]


def test_steps(opt: Any) -> None:
    stub: Stub = opt.stub
    plan = opt._modes.kernels._plan
    for _ in range(4):
        give(opt)
        stub.reset()
        versions = [p._version for p in opt.state]
        opt.step()
        assert opt._modes.kernels.steady is None
        assert addresses(opt) == expected(opt)
        assert [r.name for r in stub.launches() if "compileclip_write" not in r.name] == [
            *["take_shares"] * 2,
            *["compileclip_once", "compileclip_step"] * 1,
            *["compileclip_once", "compileclip_step"],
        ]
        assert [p._version for p in opt.state] == [v + 1 for v in versions]
    assert opt._modes.kernels._plan is plan
    assert not any(isinstance(r, Copied) for r in stub.records())
    assert {float(state["step"]) for state in opt.state.values()} == {6.0}


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "a parameter's memory": lambda o, p: setattr(p, "data", p.data.clone()),
    "a state's memory": lambda o, p: o.state[p]["exp_avg"].set_(torch.zeros(3, 4)),
    "a state": lambda o, p: o.state[p].update(exp_avg=torch.zeros(3, 4)),
    "a count": lambda o, p: o.state[p].update(step=torch.zeros(())),
    "a group": lambda o, p: o.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
    "no gradient": lambda o, p: setattr(p, "grad", None),
    "a parameter": lambda o, p: o.param_groups[0].update(params=[nn.Parameter(torch.ones(3, 4))]),
    "all state": lambda o, p: o.load_state_dict(o.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_step_is_noticed(change: str, opt: Any) -> None:
    plan = opt._modes.kernels._plan
    give(opt)
    CHANGES[change](opt, opt.param_groups[0]["params"][0])
    opt.step()
    assert opt._modes.kernels._plan is not plan


def test_a_gradient_in_another_order_is_copied(opt: Any) -> None:
    plan = opt._modes.kernels._plan
    give(opt)
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.ones(4, 3).t()
    opt.step()
    assert opt._modes.kernels._plan is plan
    assert addresses(opt)[0] != expected(opt)[0]


def test_a_gradient_that_a_step_writes_meanwhile(opt: Any) -> None:
    give(opt)
    p = opt.param_groups[0]["params"][0]
    p.grad = opt.state[p]["exp_avg"]
    with pytest.warns(FallbackWarning, match="a gradient is its parameter or state"):
        opt.step()
