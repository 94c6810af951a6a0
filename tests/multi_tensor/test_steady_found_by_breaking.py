"""Faults of steps by the native call that were found by trying to break them, each mended."""

from __future__ import annotations

import copy
import enum
import gc
import io
import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import params_like, same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import compileclip

SHAPES = [(4, 4), (5,), (1,), (2, 3, 2)]
STEPS = 4  # until the native call serves


def wrapped(mode: str = "auto", shapes: Any = SHAPES) -> Any:
    torch.manual_seed(0)
    return compileclip.wrap(torch.optim.AdamW(params_like(shapes), lr=0.01), 1.0, mode=mode)


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def give(opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(opt):
        p.grad = torch.randn(p.shape, generator=generator)


def steps(opt: Any, first: int, count: int = STEPS) -> None:
    for seed in range(first, first + count):
        give(opt, seed)
        opt.step()


def numbers(opt: Any) -> list[tuple[str, Tensor]]:
    """Of parameters, state and the norm."""
    found = [("norm", opt.total_norm), *(("param", p.detach()) for p in params_of(opt))]
    for p in params_of(opt):
        found += sorted(opt.state[p].items())
    return found


class Key(enum.Enum):
    """Whose members Python cannot read from what they are printed as."""

    MINE = 1


def assert_as_eager(change: Callable[[Any], Any], shapes: Any = SHAPES) -> Any:
    """The same in mode "eager", with ``change`` between two steps."""
    opts = wrapped("auto", shapes), wrapped("eager", shapes)
    for opt in opts:
        steps(opt, 0)
        assert opt.mode == "eager" or opt._modes.kernels.steady is not None
        change(opt)
        steps(opt, STEPS)
    for (name, a), (_, b) in zip(*map(numbers, opts), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    return opts[0]


def counts(opt: Any) -> list[Tensor]:
    return [opt.state[p]["step"] for p in params_of(opt)]


def _loaded(opt: Any) -> None:
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    buffer.seek(0)
    opt.load_state_dict(torch.load(buffer))


COUNTS: dict[str, Callable[[Any], Any]] = {
    "written without a version": lambda opt: [c.data.fill_(50) for c in counts(opt)],
    "written by NumPy": lambda opt: counts(opt)[2].numpy().fill(50),
    "copied, and one of them changed": lambda opt: (
        opt.load_state_dict(copy.deepcopy(opt.state_dict())),
        steps(opt, 100),
        counts(opt)[2].add_(7),
    ),
    "loaded, and one of them changed": lambda opt: (
        _loaded(opt),
        steps(opt, 100),
        counts(opt)[2].add_(7),
    ),
    "in memory that processes share": lambda opt: [c.share_memory_() for c in counts(opt)],
}


@pytest.mark.parametrize("change", COUNTS)
def test_counts(change: str) -> None:
    assert_as_eager(COUNTS[change])


def test_a_lazy_copy_of_a_count_stays() -> None:
    opt = wrapped()
    steps(opt, 0)
    copied = torch._lazy_clone(counts(opt)[0])
    steps(opt, STEPS)
    assert copied == STEPS
    assert counts(opt)[0] == 2 * STEPS


def test_counts_that_differ_are_apart() -> None:
    """Else each bucket's writing seems to be somebody's to the other, and all is slow for good."""
    opt = wrapped()
    steps(opt, 0)
    give(opt, 100)
    params_of(opt)[0].grad = None
    opt.step()
    steps(opt, 0, 2 * STEPS)
    assert [w.bucket.values["step"] for w in opt._modes.kernels._works] == [12, 13]
    assert opt._modes.kernels.steady is not None


def test_the_only_count_is_swapped() -> None:
    """It is the buffer itself, whose memory is then gone."""

    def swap(opt: Any) -> None:
        torch.utils.swap_tensors(counts(opt)[0], torch.tensor(50.0))
        gc.collect()

    assert_as_eager(swap, [(4, 4)])


def test_an_interrupt_right_after_the_native_call() -> None:
    """The step is done: its count must not be taken for that before."""

    class Interrupting:
        def __init__(self, library: Any) -> None:
            self.torch, self._step = library.torch, library.step

        def step(self, *args: Any) -> None:
            assert self._step(*args) == 0
            raise KeyboardInterrupt

    def interrupt(opt: Any) -> None:
        give(opt, 100)
        if opt.mode == "eager":
            opt.step()
            return
        steady = opt._modes.kernels.steady
        known = steady._library
        steady._library = Interrupting(known)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
        steady._library = known

    assert_as_eager(interrupt)


@pytest.mark.parametrize("own", ["param", "exp_avg", "exp_avg_sq"])
def test_a_gradient_that_a_step_writes_meanwhile(own: str) -> None:
    def change(opt: Any) -> None:
        for seed in range(3):
            give(opt, seed)
            p = params_of(opt)[0]
            p.grad = p.detach() if own == "param" else opt.state[p][own]
            opt.step()

    assert_as_eager(change)


def _set(what: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def replace(opt: Any) -> None:
        groups = opt.param_groups
        if what == "groups":
            opt.optimizer.param_groups = change(groups)
        elif what == "group":
            groups[0] = change(groups[0])
        else:
            groups[0]["params"] = change(groups[0]["params"])

    return replace


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_set("groups", tuple), id="a tuple of groups"),
        pytest.param(_set("params", tuple), id="a tuple of parameters"),
        pytest.param(_set("group", UserDict), id="a group that is no dict"),
        pytest.param(_set("params", lambda p: [*p, p[0]]), id="a parameter twice"),
    ],
)
def test_groups_that_are_others(change: Callable[[Any], Any]) -> None:
    assert_as_eager(change)


def test_a_key_that_is_no_string() -> None:
    assert_as_eager(lambda opt: opt.param_groups[0].update({Key.MINE: 1}))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("betas", (0.9, 1.5), RuntimeError), ("lr", 10**400, OverflowError)],
    ids=["a complex correction", "too large an integer"],
)
def test_numbers_that_are_none(name: str, value: Any, error: type[Exception]) -> None:
    """The error is torch's, and the next step is right."""
    opt = wrapped()
    steps(opt, 0)
    group = opt.param_groups[0]
    known, group[name] = group[name], value
    before = numbers(opt)[1 : 1 + len(SHAPES)]
    for seed in range(3):
        give(opt, seed)
        with pytest.raises(error):
            opt.step()
    assert all(same(a, b) for (_, a), (_, b) in zip(before, numbers(opt)[1:], strict=False))
    group[name] = known
    steps(opt, STEPS)
    assert math.isfinite(opt.total_norm)


@pytest.mark.parametrize("which", ["param", "exp_avg"])
def test_what_is_to_be_negated_at_the_same_address(which: str) -> None:
    def negate(opt: Any) -> None:
        p = params_of(opt)[0]
        tensor = p if which == "param" else opt.state[p][which]
        tensor.data = torch._neg_view(tensor.data)

    opt = assert_as_eager(negate)
    assert "negated" in opt._modes.kernels.why_not[0]


def test_another_dtype_at_the_same_address() -> None:
    opt = wrapped()
    steps(opt, 0)
    p = params_of(opt)[0]
    give(opt, 100)
    p.requires_grad_(False)
    p.data = p.data.view(torch.int32)
    kernels = opt._modes.kernels
    assert kernels.steady.run(opt._settings, None) is None
    assert kernels._gather() is None


@pytest.mark.parametrize("regular", [True, False], ids=["regular", "native"])
def test_a_gradient_of_a_class_with_operations(regular: bool) -> None:
    """The norm is then of that class, too, and has no memory."""
    opt = wrapped()
    steps(opt, 0)
    give(opt, 100)
    p = params_of(opt)[0]
    p.grad = TwoTensor(p.grad, p.grad.clone())
    if regular:
        opt._modes.kernels.steady = None
    opt.step()
    assert isinstance(opt.total_norm, TwoTensor)
    assert counts(opt)[0] == STEPS + 1


def test_a_mode_in_which_tensors_have_no_memory() -> None:
    """Eager fails there as well, when it has counted a parameter."""

    def fake(opt: Any) -> None:
        give(opt, 100)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match=r"aten\."):
            opt.step()
        opt.total_norm = None

    opt = assert_as_eager(fake)
    assert opt._modes.kernels.steady is not None
