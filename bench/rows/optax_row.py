"""optax's clipping and AdamW under ``jax.jit``, where jax is installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from bench.cases.case import NotRunError
from bench.cases.workload import Difference, Workload
from bench.rows.optimizers import MAX_NORM
from bench.rows.runs import Run


class Optax(Run):
    """``optax.clip_by_global_norm`` and ``optax.adamw`` as one jitted function.

    Parameters and state are donated, so that XLA updates them in place. A step waits for its end,
    so that on a GPU its time cannot be told from the host's.
    """

    foreign = True

    def __init__(self, work: Workload) -> None:
        super().__init__(work)
        if work.case.optimizer != "AdamW" or work.case.dtype != work.case.state_dtype:
            raise NotRunError("this row is for AdamW, with parameters and state of one dtype")
        self.jax, self.optax = _import()
        if self.jax.default_backend() != "cpu":
            self.jax.config.update("jax_default_device", self.jax.devices("cpu")[0])
        self._grads: list[Any] = []
        options = dict(work.case.recipe.options)
        self.chain = self.optax.chain(
            self.optax.clip_by_global_norm(MAX_NORM),
            self.optax.adamw(options["lr"], weight_decay=options["weight_decay"]),
        )
        self.values = [self._take(p) for p in work.params]
        self.state = self._checkpoint()
        self._jitted = self.jax.jit(self._update, donate_argnums=(0, 1))

    def prepare(self, grads: Sequence[Tensor]) -> None:
        """Take the gradients of the next step."""
        self._grads = self.jax.block_until_ready([self._take(grad) for grad in grads])

    def step(self) -> None:
        """Clip and step."""
        stepped = self._jitted(self.values, self.state, self._grads)
        self.values, self.state = self.jax.block_until_ready(stepped)

    def release(self) -> None:
        """Let the gradients go."""
        self._grads = []

    def difference(self) -> Difference:
        """From the reference, after the steps of the check."""
        tree = self.optax.tree_utils
        mu, nu = (tree.tree_get(self.state, name) for name in ("mu", "nu"))
        state = [
            {"exp_avg": self._give(m), "exp_avg_sq": self._give(v)}
            for m, v in zip(mu, nu, strict=True)
        ]
        return self.work.difference([self._give(p) for p in self.values], state)

    def _update(self, values: Any, state: Any, grads: Any) -> Any:
        updates, state = self.chain.update(grads, state, values)
        return self.optax.apply_updates(values, updates), state

    def _checkpoint(self) -> Any:
        mu, nu = ([self._take(s[k]) for s in self.work.state] for k in ("exp_avg", "exp_avg_sq"))
        count = self.jax.numpy.ones((), self.jax.numpy.int32)
        state = self.chain.init(self.values)
        return self.optax.tree_utils.tree_set(state, count=count, mu=mu, nu=nu)

    def _take(self, tensor: Tensor) -> Any:
        """A jax array of its own, which may be donated."""
        return self.jax.dlpack.from_dlpack(tensor.detach().clone())

    def _give(self, value: Any) -> Tensor:
        tensor: Tensor = from_dlpack(value)
        return tensor


def _import() -> tuple[Any, Any]:
    # Else jax takes three quarters of a GPU's memory at its start, if there is one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return importlib.import_module("jax"), importlib.import_module("optax")
    except ImportError as error:
        raise NotRunError(f"{error.name or error} is not installed") from error
