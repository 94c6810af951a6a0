"""What ``pointers.py`` does in native code, where there is no C++ compiler: slower, and as right.

Only a GPU's kernels can do without one; a CPU's are C++ themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from compileclip.buckets.bucket import Bucket, StaleError


class Surroundings:
    """As ``pointers.Surroundings``."""

    def __init__(self, optimizer: Optimizer, refused: Iterable[Tensor]) -> None:
        self._optimizer, self._refused = optimizer, list(refused)
        self._params = [list(group["params"]) for group in optimizer.param_groups]
        self._state = list(optimizer.state.items())
        self._idle = [p for params in self._params for p in params if p.grad is None]

    def are_unchanged(self) -> bool:
        """Whether groups, parameters and state are the same, with the same gradients missing."""
        groups = self._optimizer.param_groups
        return (
            len(groups) == len(self._params)
            and all(map(_are_the_same, (g["params"] for g in groups), self._params))
            and _are_the_same(self._optimizer.state, (p for p, _ in self._state))
            and _are_the_same(self._optimizer.state.values(), (s for _, s in self._state))
            and all(p.grad is None for p in self._idle)
            and all(p.grad is not None for p in self._refused)
        )


class Lookup:
    """The addresses of a bucket's tensors, looked up one by one."""

    def __init__(self, bucket: Bucket, kept: Sequence[str]) -> None:
        """Remember what must not change.

        Args:
            bucket: whose.
            kept: the names of its state.
        """
        self._bucket, self._kept = bucket, kept
        self._shapes = [(p.shape, p.stride()) for p in bucket.params]
        self._seen = [self._look(i) for i in range(len(bucket.params))]
        grad = bucket.params[0].grad
        assert grad is not None
        self._kind = grad.dtype, grad.layout, grad.device

    def gather(self, addresses: Any, places: Sequence[int], grads: Any) -> bool:
        """Look up the gradients' addresses.

        Args:
            addresses: takes them, in the order of the parameters.
            places: where each goes in ``grads``.
            grads: takes them too.

        Returns:
            Whether all gradients are laid out as their parameters.

        Raises:
            StaleError: parameters, gradients or state are not what they were.
        """
        alike = True
        for i, (p, (shape, stride)) in enumerate(
            zip(self._bucket.params, self._shapes, strict=True)
        ):
            grad = p.grad
            if grad is None or (grad.dtype, grad.layout, grad.device) != self._kind:
                raise StaleError
            if (p.shape, p.stride()) != (shape, stride) or grad.shape != shape or grad.is_neg():
                raise StaleError
            if not _are_alike(self._seen[i], self._look(i)):
                raise StaleError
            alike &= grad.stride() == stride
            address = grad.data_ptr()
            if address and any(type(x) is int and x == address for x in self._seen[i]):
                raise StaleError  # it is what the step writes
            addresses[i] = grads[places[i]] = address
        return alike

    def _look(self, index: int) -> list[Any]:
        """Objects and addresses that stay."""
        param, state = self._bucket.params[index], self._bucket.states[index]
        held = [state.get(name) for name in self._kept]
        tensors = [t for t in held if isinstance(t, Tensor)]
        layouts = [n for t in tensors for n in (t.data_ptr(), *t.shape, *t.stride())]
        return [param.data_ptr(), *held, *layouts]


def _are_alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether both hold the same objects, or equal numbers."""
    return len(a) == len(b) and all(
        x is y or (type(x) is int and x == y) for x, y in zip(a, b, strict=True)
    )


def _are_the_same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    one, other = list(a), list(b)
    return len(one) == len(other) and all(x is y for x, y in zip(one, other, strict=True))
