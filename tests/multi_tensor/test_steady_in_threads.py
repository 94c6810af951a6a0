"""Steps while other threads run, in processes of their own, since they crashed or hung."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from test_steady_found_by_breaking import give, wrapped


def run_apart(script: str) -> None:
    """Run ``script`` in a process of its own, which has the functions imported here."""
    head = "import sys; sys.path[:0] = sys.argv[1].split(':')\n"
    names = "from test_steady_found_by_breaking import *\n"
    code = head + names + "import torch\n" + textwrap.dedent(script)
    paths = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-c", code, paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])


@pytest.mark.parametrize("asked", ["dispatch_device", "dispatch_layout"])
def test_a_gradient_whose_kind_only_python_knows(asked: str) -> None:
    run_apart(f"""
        from torch.utils._pytree import tree_map
        class Odd(torch.Tensor):
            @staticmethod
            def __new__(cls, t):
                options = dict(dtype=t.dtype, device=t.device, {asked}=True)
                return torch.Tensor._make_wrapper_subclass(cls, t.shape, **options)
            def __init__(self, t):
                self.t = t
            @classmethod
            def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
                bare = lambda x: x.t if isinstance(x, Odd) else x
                return f(*tree_map(bare, args), **tree_map(bare, kwargs or {{}}))
        torch.set_num_threads(2)
        opt = wrapped(shapes=[(4, 4)] * 3000)
        for seed in range(5):
            give(opt, seed)
            opt.step()
        p = params_of(opt)[-3]
        p.grad = Odd(torch.ones(4, 4))
        opt.step()
        assert opt.state[p]["step"] == 6
    """)


@pytest.mark.parametrize("quick", [True, False])
def test_another_thread_replaces_gradients(quick: bool) -> None:
    run_apart(f"""
        import threading, time
        opt = wrapped(shapes=[(3000, 1000)] * 6)
        give(opt, 0)
        for _ in range(4):
            opt.step()
        ended = []
        def replace():
            while not ended:
                for k in range(5):
                    for p in params_of(opt):
                        p.grad = torch.empty(p.shape)
                time.sleep(0.001)
        threads = [threading.Thread(target=replace) for _ in range(2)]
        for thread in threads:
            thread.start()
        end = time.time() + 4
        try:
            while time.time() < end:
                if not {quick}:
                    opt._modes.kernels.steady = None
                opt.step()
        finally:
            ended.append(True)
            for thread in threads:
                thread.join()
    """)


def test_two_threads_step_one_optimizer() -> None:
    run_apart("""
        import threading, time
        opt = wrapped(shapes=[(1500, 1000)] * 4 + [(7,)] * 20)
        give(opt, 0)
        for _ in range(4):
            opt.step()
        failed, end = [], time.time() + 4
        def work():
            try:
                while time.time() < end:
                    for p in params_of(opt):
                        p.grad = torch.ones(p.shape)
                    opt.step()
            except Exception as error:
                failed.append(error)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed
        assert all(p.isfinite().all() for p in params_of(opt))
    """)


def test_a_step_waits_for_that_of_another_thread() -> None:
    opt = wrapped()
    give(opt, 0)
    done = threading.Event()
    with opt._modes.lock:
        thread = threading.Thread(target=lambda: (opt.step(), done.set()))
        thread.start()
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()


def test_a_forked_process_does_not_wait_for_a_thread_that_it_has_not() -> None:
    opt = wrapped(mode="eager")
    give(opt, 0)
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with opt._modes.lock:
            held.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no others
    pid = os.fork()
    if pid == 0:
        opt.step()
        os._exit(0 if opt.total_norm is not None else 1)
    try:
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        torch.set_num_threads(threads)
        end.set()
        thread.join()
