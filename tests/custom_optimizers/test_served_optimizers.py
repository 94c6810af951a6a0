"""Every optimizer of pytorch_optimizer that steps from parameters alone: served, or why not.

Read in 4.1.0; of another version, those that are missing are skipped. ``served_optimizers.py``
prints the table of what is installed.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import foreign_optimizers as foreign
import pytest
from helpers import assert_same, assert_same_optimizer, clone_params, params_like, set_grads
from served_optimizers import SHAPES, outcome, steps_alone
from torch.optim import Optimizer

import compileclip

SERVED = """
    ADOPT APOLLO AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaMax AdaMod AdaPNM AdaSmooth Adam
    AdamC AdamG AdamW AdamWSN Adan Ano BCOS DiffGrad DualAdam EXAdam FOCUS FTRL Fira GaLore Grams
    GrokFastAdamW Kate LaProp Lion MSVAG NAdam PAdam PID PNM QHM RAdam RMSprop SGD SGDW SRMM
    ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD SignSGD SimplifiedAdEMAMix Tiger VSGD Yogi
"""
# What the reason begins with, and whose it is. Many take norms of tensors; those that are pointwise
# all the same keep state in other ways than a tensor of the parameter's shape under a name.
REASONS = {
    "aten.linalg_vector_norm.default is not pointwise": """
        ASGD AdaFactor AdaNorm AdaTAM ApolloDQN AvaGrad CAME Fromage LARS Lamb TAM
    """,
    "aten._foreach_norm.Scalar is not pointwise": "AdaGC DAdaptSGD",
    "aten.sum.default is not pointwise": """
        A2Grad Adai AdamS Aida DAdaptAdaGrad DAdaptAdan NovoGrad
    """,
    "aten.mean": "Adalite Amos EmoFact FAdam RACS ROSE Ranger StableAdamW",
    "aten.max.default is not pointwise": "StableSPAM",
    "aten.minimum.default takes a tensor that is no state": "SM3",  # one for each row
    "aten.std.correction is not pointwise": "SGDSaI",
    "aten.mm.default is not pointwise": "SPlus",
    "aten.permute.default is not pointwise": "SOAP Shampoo",
    "aten.squeeze.default is not pointwise": "DASH",
    "aten.view.default is not pointwise": """
        AdamP DAdaptAdam DAdaptLion Nero Prodigy SGDP SWATS
    """,
    "aten.zeros.default is not pointwise": "Alice",
    "aten.new_zeros.default is not pointwise": "Conda",
    "aten.normal_.default draws random numbers": "Gravity",
    "the optimizer keeps a ": "Magma SPAM",
    "the state 'beta1_weight' has a shape of its own": "QHAdam",
    "the state 'grad_queue' is a deque": "AdaShift",
    "the state 'momentum_buffer' is a dict": "AggMo",
    "the step keeps state that is of no parameter": "EmoLynx EmoNavi MADGRAD",
    "a trial could leave a trace: ": """
        FlashAdamW Kron MARS SCION SCIONLight SaRA ScalableShampoo
    """,
}
TABLE: dict[str, str | None] = dict.fromkeys(SERVED.split())
TABLE |= {name: reason for reason, names in REASONS.items() for name in names.split()}
# Of the largest element after seven steps, by roots and powers; observed: 1.2e-7, of most 0.
CLOSE = 2e-7


@pytest.mark.parametrize("name", TABLE)
def test_served_or_why_not(name: str) -> None:
    package: Any = pytest.importorskip("pytorch_optimizer")
    if not hasattr(package, name):
        pytest.skip(f"this pytorch_optimizer has no {name}")
    found = outcome(getattr(package, name))
    if TABLE[name] is None:
        assert found.reason is None
    else:
        assert found.reason is not None
        assert found.reason.startswith(TABLE[name])
    assert found.error <= (CLOSE if found.reason is None else 0)


def test_the_table_has_them_all() -> None:
    pytest.importorskip("pytorch_optimizer")
    if importlib.metadata.version("pytorch_optimizer") != "4.1.0":
        pytest.skip("another version than was read")
    found = vars(importlib.import_module("pytorch_optimizer")).values()
    optimizers = {c for c in found if inspect.isclass(c) and issubclass(c, Optimizer)}
    alone = {c.__name__ for c in optimizers - {Optimizer} if steps_alone(c)}
    assert alone == TABLE.keys()


@pytest.mark.parametrize(
    "cls", [foreign.SgnLion, foreign.Atan2Adam, foreign.Bounds, foreign.Masks, foreign.Refilled]
)
def test_served_to_the_bit(cls: Any) -> None:
    """But for the angle of two numbers, in which ATen's vector library differs."""
    params = params_like(SHAPES)
    others = clone_params(params)
    ours = compileclip.wrap(cls(params), 1.0, mode="multi_tensor")
    theirs = compileclip.wrap(cls(others), 1.0, mode="eager")
    for seed in range(5):
        for opt, tensors in ((ours, params), (theirs, others)):
            set_grads(tensors, seed)
            opt.step()
    assert ours._modes.kernels is not None
    assert ours._modes.kernels.why_not is None
    if cls is not foreign.Atan2Adam:
        assert_same_optimizer(ours, theirs)
        return
    for p, q in zip(params, others, strict=True):  # observed: 3e-8
        assert (p - q).abs().max() <= 2e-7 * q.abs().max()


def test_a_number_that_changes_on_a_parameters_device() -> None:
    """Where no number has a value, what was written to it since is not known."""
    params = params_like(SHAPES)
    others = clone_params(params)
    ours = compileclip.wrap(foreign.BoundsInPlace(params), 1.0, mode="auto")
    theirs = compileclip.wrap(foreign.BoundsInPlace(others), 1.0, mode="eager")
    for seed in range(3):
        for opt, tensors in ((ours, params), (theirs, others)):
            set_grads(tensors, seed)
            opt.step()
        assert_same(params, others, "parameter")
    assert ours._modes.kernels is not None
    assert ours._modes.kernels.why_not is not None
    assert "a number on a parameter's device" in ours._modes.kernels.why_not[0]
