"""The benchmark's rows compute what they should, for every optimizer and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import QUICK, case, row, run

from bench.cases.workload import Workload
from bench.reporting.results import RowResult
from bench.rows import limit
from bench.rows.registry import BASELINE, LIMIT


def not_compiled(found: dict[str, RowResult]) -> dict[str, RowResult]:
    """Without the rows that ``QUICK`` leaves out."""
    for name, result in list(found.items()):
        if row(name).per_tensor:
            assert result.status == "not run"
            assert "--compile-tensors 0" in found.pop(name).reason
    return found


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_every_row(dtypes: str) -> None:
    found = not_compiled(run(case(dtypes=dtypes)))
    for name, result in found.items():
        assert result.status == "ok", (name, result.reason)
        assert result.median_ms > 0
        assert result.lower_ms <= result.median_ms <= result.upper_ms
        assert result.host_us > 0
        assert result.share_of_limit > 0
        if name != LIMIT:
            assert 0 < result.difference < (1e-7 if dtypes == "float32" else 1e-3)
            assert result.extra_bytes >= 0
    # Copies of two gradients of 70 x 130 at once, as foreach computes with lists.
    assert found["clip + foreach"].extra_bytes >= 70 * 130 * (4 if dtypes == "float32" else 2)
    assert found[BASELINE].ratio == found[LIMIT].share_of_limit == 1.0
    assert found[LIMIT].bytes_per_parameter == (32 if dtypes == "float32" else 16)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam"])
def test_every_optimizer(optimizer: str) -> None:
    found = not_compiled(run(case(optimizer)))
    reasons = {r.name: r.reason for r in found.values() if r.status != "ok"}
    expected = {}
    if optimizer in ("RMSprop", "NAdam", "RAdam"):
        without = f"torch.optim.{optimizer} has no fused=True"
        expected = {BASELINE: without, "fused, grad_scale by hand": without}
    assert reasons == expected


def test_float32_state_of_bfloat16() -> None:
    found = not_compiled(run(case("SGD", "bfloat16+float32")))
    assert found["clip + for-loop"].status == "ok"
    assert found[LIMIT].bytes_per_parameter == 16
    found = run(
        case("AdamW", "bfloat16+float32"), row("clip + for-loop"), row(BASELINE), row(LIMIT)
    )
    assert found["clip + for-loop"].reason.startswith("RuntimeError: expected dtype float")
    assert found[BASELINE].status == "failed"
    assert found[LIMIT].status == "ok"


ONE_TENSOR = replace(QUICK, compile_tensors=1)


def _compiled(name: str) -> None:
    found = run(case(shapes=((16, 8),)), row(name), row(BASELINE), method=ONE_TENSOR)
    assert found[name].status == "ok", found[name].reason
    assert found[name].ratio > 0


def test_one_graph() -> None:
    _compiled("torch.compile, one graph")


def test_optax() -> None:
    pytest.importorskip("jax")
    _compiled("optax, jax.jit")
    found = run(case("SGD", shapes=((16, 8),)), row("optax, jax.jit"), method=ONE_TENSOR)
    reason = "this row is for AdamW, with parameters and state of one dtype"
    assert found["optax, jax.jit"].reason == reason


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["torch.compile, two calls", "compileclip, inductor"])
def test_compiled(name: str) -> None:
    _compiled(name)


def test_reference_is_a_plain_run_in_float64() -> None:
    work = Workload(case("NAdam", shapes=((3,), (), (4, 5))))
    params = [torch.nn.Parameter(p.double()) for p in work.params]
    optimizer = work.case.recipe.make(params, foreach=False)
    work.load(optimizer, params)
    for state in optimizer.state.values():
        state.update({k: v.double() for k, v in state.items() if k != "step"})
    norms = []
    for factor in work.trajectory.factors:
        for p, grad in zip(params, work.new_grads(factor), strict=True):
            p.grad = grad.double()
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
    assert norms[0] > 1
    assert norms[1] == pytest.approx(0.5)
    for i, p in enumerate(params):
        torch.testing.assert_close(
            work.trajectory.reference(i).param, p.detach(), rtol=1e-13, atol=0
        )
    found = work.difference([p.detach() for p in params], [{} for _ in params])
    assert found.relative < 1e-13


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16+float32"])
def test_the_limit_changes_nothing(dtypes: str) -> None:
    work = Workload(case(dtypes=dtypes, shapes=((4097,), (3,), (100, 999))))
    before = [p.clone() for p in [*work.params, *[v for s in work.state for v in s.values()]]]
    kernel = limit.Limit(work)
    kernel.prepare(work.new_grads())
    kernel.step()
    after = [*work.params, *[v for s in work.state for v in s.values()]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
