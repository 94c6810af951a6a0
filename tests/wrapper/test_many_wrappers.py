"""Many optimizers of one class, as backward hooks need them: what one learns, all know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_same_optimizer, clone_params, compilations, params_like, set_grads
from optimizer_registry import makers
from test_optim_db import all_params

import compileclip
from compileclip.buckets import bucket_step
from compileclip.multi_tensor import kernel_cache

MAKERS = makers(["NAdam", "RAdam"])


@pytest.mark.parametrize("name", MAKERS)
def test_each_like_its_own(name: str) -> None:
    """With other shapes and hyperparameters; each equals one that is stepped in eager mode."""
    twins = []
    for i in range(20):
        params = params_like([(7, i % 5 + 1)])
        options: dict[str, Any] = {"lr": 0.01 * (i + 1), "betas": (0.9 - i / 100, 0.99)}
        options |= {"weight_decay": 0.1 if i % 2 else 0.0, "foreach": False}
        ours = compileclip.wrap(MAKERS[name](params, **options), 1.0)
        theirs = MAKERS[name](clone_params(params), **options)
        twins.append((ours, compileclip.wrap(theirs, 1.0, mode="eager", write_grads=False)))
    for seed in range(8):
        for ours, theirs in twins:
            for opt in (ours, theirs):
                set_grads(all_params(opt), seed)
                opt.step()
    for ours, theirs in twins:
        assert ours._modes.kernels.why_not is None
        for a, b in zip(all_params(ours), all_params(theirs), strict=True):
            # ATen's square root is not correctly rounded; observed: 1.2e-7.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_second_records_once_and_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}
    for owner, name in (
        (bucket_step, "record"),
        (kernel_cache, "check"),
        (kernel_cache, "assemble"),
    ):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, _name: str = name) -> Any:
            counts[_name] = counts.get(_name, 0) + 1
            return _original(*args)

        monkeypatch.setattr(owner, name, counted)
    monkeypatch.setattr(kernel_cache, "_made", {})
    monkeypatch.setattr(kernel_cache, "_checked", set())
    monkeypatch.setattr(bucket_step, "_known", {})
    monkeypatch.setattr(bucket_step, "_formulas", {})
    found = []
    for _ in range(3):
        opt = compileclip.wrap(torch.optim.AdamW(params_like([(3,)]), lr=0.1), 1.0)
        counts.clear()
        set_grads(all_params(opt), 0)
        opt.step()
        found.append(dict(counts))
        assert compilations(opt._modes.kernels) == 1
    assert found == [{"record": 3, "check": 1, "assemble": 1}, {"record": 1}, {"record": 1}]


def test_what_one_class_may_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.optim.SGD):
        """Not torch's: checked by itself, each time."""

        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    checks = []
    original = kernel_cache.check
    monkeypatch.setattr(
        kernel_cache, "check", lambda *args: (checks.append(args[0]), original(*args))
    )
    for _ in range(2):
        ours, theirs = (
            compileclip.wrap(cls(params_like([(3,)]), lr=0.1), 1.0, mode=mode, write_grads=False)
            for cls, mode in ((Own, "multi_tensor"), (torch.optim.SGD, "eager"))
        )
        theirs.load_state_dict(ours.state_dict())
        for a, b in zip(all_params(ours), all_params(theirs), strict=True):
            b.data.copy_(a)
        for opt in (ours, theirs):
            set_grads(all_params(opt), 0)
            opt.step()
        assert_same_optimizer(ours, theirs)
    assert [type(opt) for opt in checks] == [Own, Own]
