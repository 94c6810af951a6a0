"""Steps in forked processes and in threads: python concurrent_steps.py KIND ...

In a process of its own, since what goes wrong here may hang.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adamax, AdamW, Optimizer

import compileclip
from compileclip.fallback import FallbackWarning

SECONDS = 4  # until a child is given up
LARGE, MANY = [(200, 200)] * 20, [(32, 32)] * 200  # no single one of MANY is worth threads


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.1, momentum=0.9, foreach=False)


def make(new: Callable[..., Optimizer], shapes: Sequence[Any], mode: str = "multi_tensor") -> Any:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    opt = new(params)
    return opt if mode == "torch" else compileclip.wrap(opt, 1.0, mode=mode)


def params_of(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def step(opt: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(opt):
        p.grad = torch.randn(p.shape, generator=generator)
    if not isinstance(opt, compileclip.ClippedOptimizer):
        torch.nn.utils.clip_grad_norm_(params_of(opt), 1.0)
    opt.step()


def digest(opt: Any) -> str:
    """Of the bits of parameters and state."""
    found = hashlib.sha256()
    for p in params_of(opt):
        found.update(p.detach().numpy().tobytes())
        for _, value in sorted(opt.state[p].items()):
            assert isinstance(value, Tensor)
            found.update(value.numpy().tobytes())
    return found.hexdigest()


def in_a_child(run: Callable[[], str]) -> str:
    """What ``run`` returns in a forked process, which is ended if it hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        os.write(writer, run().encode())
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        answer = file.read()
    assert status == 0, f"the child ended with {status}"
    return answer


def fork(new: Any, shapes: Any, mode: str, steps: int, threads: int, threads_of_child: int) -> None:
    torch.set_num_threads(threads)
    opt = make(new, shapes, mode)
    for seed in range(steps):
        step(opt, seed)

    def steps_on() -> str:
        torch.set_num_threads(threads_of_child)
        for seed in range(steps, steps + 3):
            step(opt, seed)
        return digest(opt)

    answer = in_a_child(steps_on)
    assert steps_on() == answer


def together(*runs: Callable[[], Any]) -> None:
    """Run each in a thread of its own, all starting at once."""
    barrier, errors = threading.Barrier(len(runs)), []

    def guarded(run: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def steps_of(opt: Any, count: int = 15) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(2)  # what a new thread starts with differs from build to build
        for seed in range(count):
            step(opt, seed)

    return run


def two_optimizers() -> None:
    """Each in its thread, the first step and its compilation included."""
    cases = [(sgd, LARGE[:3]), (sgd, MANY[:50]), (Adamax, LARGE[:2]), (AdamW, MANY[:20])]
    serial, parallel = ([make(*case) for case in cases] for _ in range(2))
    together(*(steps_of(opt) for opt in parallel))
    for one, other in zip(serial, parallel, strict=True):
        steps_of(one)()
        assert digest(one) == digest(other)


def explained_while_stepping() -> None:
    opt, alone = make(AdamW, MANY), make(AdamW, MANY)
    done = threading.Event()

    def stepping() -> None:
        try:
            steps_of(opt, 40)()
        finally:
            done.set()

    def explaining() -> None:
        texts = set()
        while not done.wait(0.001):  # without which it would hold Python most of the time
            texts.add(opt.explain())
            assert opt.total_norm is None or opt.total_norm > 0
        assert any("multi_tensor" in text for text in texts)

    together(stepping, explaining)
    steps_of(alone, 40)()
    assert digest(opt) == digest(alone)


def copies() -> None:
    """A deep copy, a pickled one and the original step on, and none changes another."""
    opt = make(AdamW, MANY[:5])
    steps_of(opt, 3)()
    before = digest(opt)
    copied, pickled = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    for other in (copied, pickled):
        assert digest(other) == before
        for seed in (3, 4):
            step(other, seed)
        assert digest(opt) == before
    for seed in (3, 4):
        step(opt, seed)
    assert digest(copied) == digest(pickled) == digest(opt) != before
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["state"]
    assert [state["step"].item() for state in loaded.values()] == [3.0] * 5


KINDS: dict[str, Callable[[], None]] = {
    "fork before the first step": lambda: fork(sgd, MANY, "multi_tensor", 0, 2, 2),
    "fork, one thread in both": lambda: fork(AdamW, LARGE, "multi_tensor", 3, 1, 1),
    "fork, one thread in the child": lambda: fork(AdamW, LARGE, "multi_tensor", 3, 2, 1),
    "fork, few elements": lambda: fork(sgd, MANY[:20], "multi_tensor", 3, 2, 2),
    "fork of torch": lambda: fork(sgd, MANY, "torch", 3, 2, 2),
    "fork": lambda: fork(sgd, MANY, "multi_tensor", 3, 2, 2),
    "fork, large": lambda: fork(sgd, LARGE, "multi_tensor", 3, 2, 2),
    "two optimizers": two_optimizers,
    "explained while stepping": explained_while_stepping,
    "copies": copies,
}

if __name__ == "__main__":
    signal.alarm(20 * SECONDS)
    warnings.simplefilter("error", FallbackWarning)
    for kind in sys.argv[1:]:
        KINDS[kind]()
        print(kind, flush=True)
