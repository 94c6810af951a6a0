"""A second process finds what the first one compiled in Inductor's and AOTAutograd's caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHANGE = """
import compileclip.passes
from dataclasses import make_dataclass
from compileclip.passes.fuse_stock_clip import FuseStockClip
Changed = make_dataclass("Changed", [("field", int, 1)], bases=(FuseStockClip,), frozen=True)
Changed.__module__ = FuseStockClip.__module__
compileclip.passes.default_passes = lambda: (Changed(),)
"""
CLIP = """
params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5)]
for p in params:
    p.grad = torch.ones_like(p)
clip = torch.compile(
    lambda: torch.nn.utils.clip_grad_norm_(params, 1.0), backend="compileclip"
)
print(clip().item(), params[0].grad.tolist())
"""
TRAINING = """
import compileclip
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
opt = compileclip.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), 0.1, mode={mode!r})

def step(x):
    loss = model(x).square().sum()
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()

if {mode!r} == "eager":
    step = compileclip.compile(step)
print(step(torch.ones(2, 4)).item(), opt.total_norm.item(), model[0].weight.sum().item())
"""
COUNTS = """
from torch._dynamo.utils import counters
c = counters["inductor"]
print(c["fxgraph_cache_hit"], c["fxgraph_cache_miss"], c["fxgraph_cache_bypass"])
print(counters["aot_autograd"]["autograd_cache_hit"])
"""
CODE = {
    "backend": CLIP,
    "compiled step": TRAINING.format(mode="inductor"),
    "training step": TRAINING.format(mode="eager"),
}


@pytest.mark.parametrize("what", CODE)
def test_caches_across_processes(what: str, tmp_path: Path) -> None:
    def run(change: str = "", **environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", "import torch\n" + change + CODE[what] + COUNTS],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, second = run(), run()
    assert first[0] == second[0]
    assert first[1:] == ["0 1 0", "0"]
    assert second[1:] == ["1 0 0", "1"]
    if what == "backend":  # all three hand the same passes to Inductor
        for changed in (run(CHANGE), run(COMPILECLIP_DISABLE_PASSES="share_norm_pass")):
            assert changed[0] == first[0]
            assert changed[1:] == ["0 1 0", "0"]
