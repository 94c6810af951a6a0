"""A trial of a step leaves nothing in the process but what the bare optimizer's steps leave."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
import random
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, params_like, set_grads
from leaking_optimizers import ALL
from process_picture import changes, picture, put_back, seen

import compileclip

SHAPES = [(3, 4), (5,), (2, 3, 2)]
STEPS = 3
SERVED = {"Plain"}
_numbers = itertools.count()


def fresh() -> ModuleType:
    """The odd optimizers, of which nobody has stepped."""
    name = f"leaking_optimizers_{next(_numbers)}"
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).with_name("leaking_optimizers.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def steps(name: str, mode: str | None, capsys: Any) -> tuple[dict[str, Any], Any]:
    """What some steps leave, and the optimizer; bare without a mode."""
    module, records = fresh(), []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    module.LOG.addHandler(handler)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    params = params_like(SHAPES)
    for p in params:
        p.marks = []
    opt: Any = getattr(module, name)(params)
    stepped = opt if mode is None else compileclip.wrap(opt, 0.5, mode=mode)
    capsys.readouterr()
    with put_back(), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        torch.set_warn_always(name == "Deprecated")
        before = picture(module)
        for seed in range(STEPS):
            set_grads(params, seed)
            if mode is None:
                compileclip.clip_grad_norm_(params, 0.5)
            stepped.step()
        gc.collect()
        found = changes(before, picture(module))
    found["warnings"] = [str(w.message) for w in given if not ours(w.category)]
    found["printed"] = capsys.readouterr()
    found["logged"] = len(records)
    found["parameters"] = seen(params)
    found["defaults"] = opt.defaults
    # What tells a scheduler that was made before the wrapper.
    found["optimizer"] = {k: seen(v) for k, v in vars(opt).items() if k != "_opt_called"}
    return found, stepped


def ours(category: type[Warning]) -> bool:
    return issubclass(category, compileclip.FallbackWarning)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """What is imported, compiled and looked up once is no trace of a trial."""
    for name in ("Plain", "Compiles"):
        params = params_like(SHAPES)
        for opt in (ALL[name](params), compileclip.wrap(ALL[name](params), 0.5)):
            set_grads(params, 0)
            opt.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["auto", "multi_tensor"])
@pytest.mark.parametrize("name", ALL)
def test_it_leaves_what_the_bare_one_leaves(name: str, mode: str, capsys: Any) -> None:
    found, opt = steps(name, mode, capsys)
    expected, bare = steps(name, None, capsys)
    for what in expected.keys() | found.keys():
        assert str(found.get(what)) == str(expected.get(what)), what
    assert_same(opt.param_groups[0]["params"], bare.param_groups[0]["params"], "parameter")
    served = opt._modes.kernels.why_not is None
    assert served == (name in SERVED)
    if not served:
        assert "why eager: " in opt.explain()


@pytest.mark.parametrize("name", sorted(ALL.keys() - SERVED))
def test_what_is_odd_leaves_something(name: str, capsys: Any) -> None:
    """Or it would show nothing that it leaves the same."""
    found, plain = steps(name, None, capsys)[0], steps("Plain", None, capsys)[0]
    assert found != plain


WARNS = """
import sys, warnings
sys.path[:0] = {tests!r}
import compileclip
from helpers import params_like, set_grads
from leaking_optimizers import Deprecated
if {filter!r}:
    warnings.simplefilter({filter!r})
params = params_like([(3, 4), (5,)])
opt = Deprecated(params)
opt = compileclip.wrap(opt, None, mode={mode!r}) if {mode!r} else opt
for seed in range(3):
    set_grads(params, seed)
    try:
        opt.step()
    except UserWarning:
        print("raised in step", seed)
"""


@pytest.mark.parametrize("action", ["", "error", "always", "ignore"])
def test_what_torch_warns_of_once_is_given_once(action: str) -> None:
    """In a process of its own each, for torch notes it for the process."""
    found = []
    for mode in ("auto", ""):
        here = Path(__file__).parent
        script = WARNS.format(tests=[str(here), str(here.parent)], filter=action, mode=mode)
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found.append((ran.stdout, ran.stderr.count("is deprecated")))
    expected = {"error": ("raised in step 0\n", 0), "ignore": ("", 0)}
    assert found == [expected.get(action, ("", 1))] * 2
