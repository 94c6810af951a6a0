"""mode="inductor" where steps are eager instead, with at most one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import assert_same_optimizer, set_grads
from inductor_runs import fresh, largest_difference, wrapped
from test_optim_db import all_params
from torch.optim import SGD, AdamW

import compileclip
from compileclip.fallback import FallbackWarning

__all__ = ["fresh"]


def assert_one_fallback(caught: list[Any], cause: str) -> None:
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == 1
    assert cause in messages[0]


@torch._dynamo.config.patch(recompile_limit=2)
def test_what_changes_at_every_step_ends_in_one_warning() -> None:
    opt, twin = wrapped(), compileclip.wrap(wrapped().optimizer, 1.0, mode="eager")
    with warnings.catch_warnings(record=True) as caught:
        for step in range(6):
            for o in (opt, twin):
                set_grads(all_params(o), step)
                o.param_groups[0]["nesterov"] = step % 2 == 0
                o.param_groups[0]["maximize"] = step % 3 == 0
                o.step()
    assert_one_fallback(caught, "recompile_limit")
    assert largest_difference(all_params(opt), all_params(twin)) < 1e-5


class Untraceable(SGD):
    """Its step reads a value on the host, which a full graph cannot."""

    def step(self, closure: Any = None) -> None:
        if self.param_groups[0]["params"][0].detach().sum().item() > 1e9:
            raise AssertionError
        with open("/dev/null") as file:
            file.read()
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


def sparse(opt: Any) -> None:
    p = all_params(opt)[0]
    p.grad = p.grad.to_sparse()


@pytest.mark.parametrize(
    ("make", "prepare", "cause"),
    [
        (Untraceable, None, "run it in eager mode"),
        (lambda p: AdamW(p, fused=True), None, "fused=True"),
        (lambda p: SGD(p, lr=0.1), sparse, "sparse"),
    ],
)
def test_falls_back_to_eager_with_one_warning(make: Any, prepare: Any, cause: str) -> None:
    opt, twin = wrapped(make), wrapped(make)
    twin = compileclip.wrap(twin.optimizer, 1.0, mode="eager")
    with warnings.catch_warnings(record=True) as caught:
        for step in range(3):
            for o in (opt, twin):
                set_grads(all_params(o), step, scale=3)
                if prepare:
                    prepare(o)
                o.step()
    assert_one_fallback(caught, cause)
    assert f"why eager: {opt._modes.compiled.refusal.cause}" in opt.explain()
    assert_same_optimizer(opt, twin)
    assert torch.equal(opt.total_norm, twin.total_norm)


def test_no_compiler_falls_back_to_eager() -> None:
    from torch._inductor import config

    opt, twin = wrapped(), compileclip.wrap(wrapped().optimizer, 1.0, mode="eager")
    no_compiler = {"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True}
    with config.patch(no_compiler), warnings.catch_warnings(record=True) as caught:
        for step in range(3):
            for o in (opt, twin):
                set_grads(all_params(o), step, scale=3)
                o.step()
    assert_one_fallback(caught, "compiler")
    assert_same_optimizer(opt, twin)


@pytest.mark.parametrize("how", ["stance", "environment"])
def test_compiling_switched_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, twin = wrapped(), wrapped()
    twin = compileclip.wrap(twin.optimizer, 1.0, mode="eager")
    for step in range(3):
        for o in (opt, twin):
            set_grads(all_params(o), step, scale=3)
        twin.step()
        if how == "environment":
            monkeypatch.setenv("COMPILECLIP_DISABLE", "1")
            opt.step()
        else:
            with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                opt.step()
    assert_same_optimizer(opt, twin)
    assert torch.equal(opt.total_norm, twin.total_norm)
