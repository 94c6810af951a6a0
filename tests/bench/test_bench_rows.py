"""The benchmark's rows compute what they should, for every optimizer and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import QUICK, Unclipped, case, row, run

from bench.cases import workload
from bench.cases.workload import PARAM, Workload
from bench.reporting.results import RowResult
from bench.rows import limit
from bench.rows.registry import BASELINE, LIMIT, Row


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


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "Adagrad", "RMSprop", "NAdam", "RAdam"])
def test_every_optimizer(optimizer: str) -> None:
    found = not_compiled(run(case(optimizer)))
    reasons = {r.name: r.reason for r in found.values() if r.status != "ok"}
    expected = {}
    if optimizer in ("RMSprop", "NAdam", "RAdam"):
        without = f"torch.optim.{optimizer} has no fused=True"
        expected = {BASELINE: without, "fused, grad_scale by hand": without}
    assert reasons == expected


ONE_TENSOR = replace(QUICK, compile_tensors=1)


def _compiled(name: str) -> None:
    found = run(case(shapes=((16, 8),)), row(name), row(BASELINE), method=ONE_TENSOR)
    assert found[name].status == "ok", found[name].reason
    assert found[name].ratio > 0


def test_one_graph() -> None:
    _compiled("torch.compile, one graph")


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["torch.compile, two calls", "compileclip, inductor"])
def test_compiled(name: str) -> None:
    _compiled(name)


def test_reference_is_a_plain_run_in_float64() -> None:
    work = Workload(case("NAdam", shapes=((3,), (), (4, 5))))
    params = [torch.nn.Parameter(p.double()) for p in work.params]
    optimizer = work.case.make_optimizer(params, foreach=False)
    work.load(optimizer, params)
    for state in optimizer.state.values():
        state.update({k: v.double() for k, v in state.items() if k != "step"})
    norms = []
    for factor in work.factors:
        for p, grad in zip(params, work.new_grads(factor), strict=True):
            p.grad = grad.double()
        norms.append(torch.nn.utils.clip_grad_norm_(params, 1.0).item())
        optimizer.step()
    assert norms[0] > 1
    assert norms[1] == pytest.approx(0.5)
    for exact, p in zip(work.reference, params, strict=True):
        torch.testing.assert_close(exact[PARAM], p.detach().reshape(-1), rtol=1e-13, atol=0)
    for tensors, exact in zip(work.tensors, work.reference, strict=True):
        for name, value in tensors.items():
            value.copy_(exact[name].view_as(value))
    assert work.difference() < 1e-8


def test_elements_of_a_large_tensor_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "COMPARED", 8)
    work = Workload(case(shapes=((1000,),)))
    assert [t[PARAM].numel() for t in work.reference] == [8]  # 1000 / 125
    found = run(case(shapes=((1000,),)), row(BASELINE), Row("wrong", Unclipped))
    assert [r.status for r in found.values()] == ["ok", "wrong"]


@pytest.mark.parametrize("sizes", [(1, 1), (7 * 2**20 + 3, 14 * 2**20 + 5), (999, 3)])
def test_the_limit_changes_nothing(sizes: tuple[int, int]) -> None:
    kernel = limit.MoveOnCpu(*sizes)
    before = kernel.target.clone()
    kernel()
    assert torch.equal(kernel.target, before)
    found = [t.nbytes - size for t, size in zip((kernel.source, kernel.target), sizes, strict=True)]
    assert all(0 <= more < limit.PIECE * limit.WORD for more in found)


def test_the_limit_reads_and_updates_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ones in place of the zero, every word of the target is changed by one of the source."""
    kernel = limit.MoveOnCpu(5 * 2**20, 11 * 2**20)
    kernel.source.fill_(1)
    kernel.target.zero_()
    move, seen = kernel._move, []
    monkeypatch.setattr(kernel, "_move", lambda *a: seen.append(move(*a[:4], 1, a[5])))
    kernel()
    assert kernel.target.min() == kernel.target.max() == 1
    kernel.source[-1] = 3  # the sum by exclusive or tells that it was read
    kernel()
    assert seen == [0, 2]
