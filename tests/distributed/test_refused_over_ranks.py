"""What cannot be one norm of all ranks is refused on all of them, and nothing has changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parameters import Spot, mesh
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.optim import SGD, AdamW

import compileclip


def params_of(*spots: Spot) -> list[nn.Parameter]:
    params = [nn.Parameter(s.hold(torch.ones(s.shape))) for s in spots]
    for s, p in zip(spots, params, strict=True):
        p.grad = s.hold(torch.ones(s.shape))
    return params


def check_unchanged(params: list[nn.Parameter], opt: Any) -> None:
    assert all(bool((compileclip.distributed.shards.local(p) == 1).all()) for p in params)
    assert not any(opt.state.values())


def check_foreign_group() -> None:
    (p,) = params_of(Spot((3,)))
    other = dist.new_group([0])
    if dist.get_rank() == 1:
        for function in (
            lambda group: compileclip.wrap(SGD([p], lr=0.1), 1.0, process_group=group),
            lambda group: compileclip.get_total_norm([p.grad], process_group=group),
        ):
            with pytest.raises(ValueError, match="a group that this rank is not in"):
                function(other)
    for given, error in (([], ValueError), (3, TypeError), ("pp", TypeError), ([None], ValueError)):
        with pytest.raises(error, match="process_group"):
            compileclip.wrap(SGD([p], lr=0.1), 1.0, process_group=given)


def test_a_group_without_this_rank(on_ranks: Any) -> None:
    on_ranks(2, check_foreign_group)


def check_disagreement(what: str) -> None:
    rank = dist.get_rank()
    last = rank == dist.get_world_size() - 1
    spots = [Spot((4, 3), (2, 2), "S0 S1"), Spot((5,), (2, 2), "S0 R")]
    bound, options = 1.0, {}
    if what == "max_norm":
        bound = 0.5 if last else 1.0
    elif what == "nonfinite":
        options = {"nonfinite": "skip"} if last else {}
    elif what == "order" and last:
        spots.reverse()
    elif what == "number" and last:
        spots.append(Spot((5,), (2, 2), "S0 R"))
    params = params_of(*spots)
    opt = compileclip.wrap(AdamW(params, lr=0.1), bound, **options)
    named = {"order": "parameters", "number": "parameters"}.get(what, what)
    with pytest.raises(ValueError, match=f"ranks disagree on {named}.*same settings") as error:
        opt.step()
    if last:
        assert f"on rank {rank}" in str(error.value)
    check_unchanged(params, opt)


@pytest.mark.parametrize("what", ["max_norm", "nonfinite", "order"])
def test_ranks_that_disagree(on_ranks: Any, what: str) -> None:
    on_ranks(4, check_disagreement, what)


def check_disagreement_of_one_group() -> None:
    """Which the other group hears of, for it would wait for these ranks."""
    rank = dist.get_rank()
    spots = [Spot((4,), (2, 2, "b"), "S0"), Spot((6,), (2, 2, "a"), "S0")]
    if rank == 3:
        spots[0] = Spot((4,), (2, 2, "b"), "R")
    params = params_of(*spots)
    opt = compileclip.wrap(AdamW(params, lr=0.1), 1.0)
    with pytest.raises(ValueError, match="ranks disagree on"):
        opt.step()
    check_unchanged(params, opt)


def test_a_group_that_disagrees(on_ranks: Any) -> None:
    on_ranks(4, check_disagreement_of_one_group, seconds=30)


def check_disagreement_of_stages() -> None:
    (p,) = params_of(Spot((3 + dist.get_rank(),)))
    opt = compileclip.wrap(AdamW([p], lr=0.1), 1.0 + dist.get_rank(), process_group=mesh(2))
    with pytest.raises(ValueError, match=r"ranks disagree on max_norm: (1|2).0 on rank . and|max"):
        opt.step()
    check_unchanged([p], opt)


def test_stages_that_disagree(on_ranks: Any) -> None:
    on_ranks(2, check_disagreement_of_stages)


def check_placement(impossible: bool) -> None:
    (p,) = params_of(Spot((4, 3), (2,), "S0"))
    kind = Partial("product" if not impossible else "no such reduction")
    p.grad = DTensor.from_local(torch.ones(4, 3), mesh(2), [kind], run_check=False)
    opt = compileclip.wrap(AdamW([p], lr=0.1), 1.0)
    with pytest.raises(
        ValueError, match=r"gradient of shape \(4, 3\) is placed .* redistribute it"
    ):
        opt.step()
    check_unchanged([p], opt)
    with pytest.raises(ValueError, match="cannot be placed"):
        compileclip.get_total_norm([p.grad])


def test_a_partial_gradient_that_cannot_be_reduced(on_ranks: Any) -> None:
    on_ranks(2, check_placement, True)


def check_partial_parameter() -> None:
    p = nn.Parameter(DTensor.from_local(torch.ones(3), mesh(2), [Partial()], run_check=False))
    p.grad = DTensor.from_local(torch.ones(3), mesh(2), [Partial()], run_check=False)
    opt = compileclip.wrap(SGD([p], lr=0.1), 1.0)
    with pytest.raises(ValueError, match="a sum that is still open has no norm"):
        opt.step()


def test_a_partial_parameter(on_ranks: Any) -> None:
    on_ranks(2, check_partial_parameter)


def check_copies() -> None:
    params = params_of(Spot((4, 3), (2,), "S0"))
    opt = compileclip.wrap(AdamW(params, lr=0.1), 1.0, process_group=dist.group.WORLD)
    assert "process_group=[the group of ranks (0, 1)]" in repr(opt)
    opt.step()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()
    assert opt.state[params[0]]["step"] == 2


def test_copies(on_ranks: Any) -> None:
    on_ranks(2, check_copies)


class Backends:
    """A group as ``travels_on`` sees it."""

    def __init__(self, *types: str) -> None:
        self._device_types = [torch.device(t) for t in types]


def test_where_a_number_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    from compileclip.distributed import process_groups

    monkeypatch.setattr(process_groups, "named", lambda group: "the group")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    travels_on: Any = process_groups.travels_on
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert travels_on(Backends("cpu", "cuda"), cpu) == cpu
    assert travels_on(Backends("cpu", "cuda"), gpu) == gpu
    assert travels_on(Backends("cuda"), cpu) == gpu  # FSDP2's CPU offload
    with pytest.raises(ValueError, match="each step would wait for the device"):
        travels_on(Backends("cpu"), gpu)
