"""Parameters that are one rank's part, and optimizers of some parameters: refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import params_like, set_grads
from torch import nn
from torch.optim import SGD, AdamW

import compileclip


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_fsdp1(use_orig_params: bool, alone: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Linear(4, 3)
    early = compileclip.wrap(AdamW(model.parameters(), lr=0.1), 1.0)
    sharded = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="one rank's part, of FSDP1"):
        compileclip.wrap(AdamW(sharded.parameters(), lr=0.1), 1.0)
    if use_orig_params:  # the parameters that the optimizer has had before
        before = [p.detach().clone() for p in sharded.parameters()]
        sharded(torch.ones(2, 4)).sum().backward()
        with pytest.raises(ValueError, match="one rank's part, of FSDP1"):
            early.step()
        assert all(map(torch.equal, before, sharded.parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_an_optimizer_of_some_parameters(alone: None) -> None:
    """Each rank of a ``ZeroRedundancyOptimizer`` makes one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
    for kind in (compileclip.clipped(SGD, 1.0), lambda p, **k: compileclip.wrap(SGD(p, **k), 1.0)):
        with pytest.raises(ValueError, match=r"wrap that: compileclip.wrap\(ZeroRedundancyOpt"):
            ZeroRedundancyOptimizer(model.parameters(), kind, lr=0.1)
    opt = compileclip.wrap(ZeroRedundancyOptimizer(model.parameters(), SGD, lr=0.1), 1.0)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    assert opt.total_norm > 1.0


def test_fairscales(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name of the module; fairscale is not installed."""
    module = {"__name__": "fairscale.optim.oss", "wrap": compileclip.wrap, "SGD": SGD}
    exec("def make(params):\n    return wrap(SGD(params, lr=0.1), 1.0)\n", module)
    with pytest.raises(ValueError, match=r"fairscale's OSS.*SGD.*call its clip_grad_norm before"):
        module["make"](params_like([(3,)]))


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping", "tensor_model_parallel", "_is_sharded"])
def test_marks_of_other_libraries(mark: str) -> None:
    params = params_like([(3,), (4,)])
    set_grads(params, 0)
    setattr(params[1], mark, False)
    opt = compileclip.wrap(SGD(params, lr=0.1), 1.0)
    setattr(params[1], mark, {"ds_id": 0, "_hp_mapping": None}.get(mark, True))
    with pytest.raises(ValueError, match="one rank's part"):
        opt.step()
    with pytest.raises(ValueError, match="one rank's part"):
        compileclip.wrap(SGD(params, lr=0.1), 1.0)
