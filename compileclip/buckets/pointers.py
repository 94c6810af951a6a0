"""The addresses of a bucket's tensors, checked and gathered in native code at every step.

Where ``native_tensors.py`` finds something else than Python when a table is made, nothing is
served.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from compileclip.buckets import pointers_in_python
from compileclip.buckets.bucket import Bucket, StaleError
from compileclip.buckets.pointers_in_python import Lookup
from compileclip.fallback import UnsupportedError
from compileclip.lowering import threads
from compileclip.native.native_tensors import address, has_library, library


def surroundings(
    optimizer: Optimizer, refused: Iterable[Tensor]
) -> Surroundings | pointers_in_python.Surroundings:
    """An optimizer as it is now, natively if there is a compiler; see ``Surroundings``."""
    made = Surroundings if has_library() else pointers_in_python.Surroundings
    return made(optimizer, refused)


class Identities:
    """Python objects, by identity; they are kept alive."""

    def __init__(self, objects: Iterable[Any]) -> None:
        self.objects = list(objects)
        self.addresses = array("Q", map(id, self.objects))

    def as_struct(self) -> tuple[int, int]:
        """As ``Objects`` of the native code; valid while this is alive."""
        return len(self.objects), address(self.addresses)


class Surroundings:
    """An optimizer's parameters and state dictionaries as they are now.

    Attributes:
        native: ``Optimizer`` of the native code; valid while this is alive.

    Raises:
        CompilerError: there is no compiler.
    """

    def __init__(self, optimizer: Optimizer, refused: Iterable[Tensor]) -> None:
        """Keep them in mind, and which parameters have a gradient.

        Args:
            optimizer: whose.
            refused: parameters with a gradient that are in no bucket.
        """
        self._optimizer = optimizer
        groups: list[Any] = [Identities(group["params"]) for group in optimizer.param_groups]
        idle = (p for group in groups for p in group.objects if p.grad is None)
        state = optimizer.state
        others = [Identities(o) for o in (state, state.values(), idle, refused)]
        key = sys.intern("params")
        self._held = [key, *groups, *others]
        self._params = array("q", chain.from_iterable(group.as_struct() for group in groups))
        counted = (len(groups), id(key), address(self._params))
        structs = chain.from_iterable(other.as_struct() for other in others)
        self._native = array("q", [*counted, *structs])
        self.native = address(self._native)

    def are_unchanged(self) -> bool:
        """Whether groups, parameters and state are the same, with the same gradients missing."""
        native, now = library(), (self._optimizer.param_groups, self._optimizer.state)
        try:
            return bool(native.same(native.torch, self.native, *now))
        except SystemError:  # no list any more, or no dictionary
            return False


class Table:
    """The addresses of a bucket's tensors.

    Attributes:
        bucket: whose.
        addresses: 64-bit, a row for each of ``bucket.dtypes``, in each one per parameter.
        grads: where in ``addresses`` those of the gradients are.
        native: ``Bucket`` of the native code; valid while this is alive; 0 without a compiler.

    Raises:
        UnsupportedError: this version of torch cannot be asked for addresses without Python.
    """

    def __init__(self, bucket: Bucket, places: Sequence[int], grads: array[int]) -> None:
        """Look up all addresses but those of gradients.

        Args:
            bucket: whose.
            places: where in ``grads`` the gradients of its parameters are.
            grads: takes the addresses of the gradients of all buckets.
        """
        self.bucket, self.places, self._grads = bucket, array("q", places), grads
        names = list(bucket.dtypes)
        self._grad_row, n = names.index("grad"), len(bucket.params)
        self.grads = slice(self._grad_row * n, (self._grad_row + 1) * n)
        params: list[Tensor] = bucket.params
        kept = [name for name in (*names, *bucket.counts) if name not in ("param", "grad")]
        columns = [[state[name] for state in bucket.states] for name in kept]
        self.addresses = array("Q", bytes(8 * len(names) * len(params)))
        assert names[0] == "param"  # the native code has it in the first row
        for row, name in enumerate(names):
            if name != "grad":
                column = params if name == "param" else columns[kept.index(name)]
                self._set_row(row, map(Tensor.data_ptr, column))
        grad = params[0].grad
        assert grad is not None
        self.native, self._slow = 0, None if has_library() else Lookup(bucket, kept)
        if self._slow is None:
            self._lay_out(kept, columns, grad)
        self._check()

    def _lay_out(self, kept: list[str], columns: list[list[Tensor]], grad: Tensor) -> None:
        """Put down what the native code is to know.

        Args:
            kept: the names of the state that is to stay.
            columns: for each, of all parameters.
            grad: one of the gradients.
        """
        bucket, names = self.bucket, list(self.bucket.dtypes)
        params: list[Tensor] = bucket.params
        objects = (params, bucket.states, kept, chain.from_iterable(columns))
        self._objects = [Identities(list(o)) for o in objects]
        self._numbers = (
            array("q", [names.index(k) if k in names else -1 for k in kept]),
            array("q", chain.from_iterable((p.dim(), *p.shape, *p.stride()) for p in params)),
            array("q", accumulate((1 + 2 * p.dim() for p in params), initial=0)),
            array("i", library().kind(grad)),
        )
        first = [bucket.states[0][name] for name in kept]
        plain = [library().plain(t) for t in (params[0], grad, *first)]
        self._plain = array("q", chain.from_iterable(plain))
        self._tags = array("Q", bytes(8 * len(params)))
        hints = list(map(_hints, params, bucket.states))
        self._hints = array("Q", (at for each in hints for at, _ in each))
        self._lines = array("q", [lines for _, lines in hints[0]])
        self._native = self._struct()
        self.native = address(self._native)

    def gather(self) -> bool:
        """Look up the gradients' addresses.

        Returns:
            Whether all gradients are laid out as their parameters.

        Raises:
            StaleError: parameters, gradients or state are not what they were.
        """
        if self._slow is not None:
            row = memoryview(self.addresses)[self.grads]
            return self._slow.gather(row, self.places, self._grads)
        native = library()
        status = native.gather(native.torch, self.native, threads())
        if status == 2:
            raise StaleError
        return bool(status == 0)

    def note_written(self, grads: bool) -> None:
        """Tell autograd that parameters, and gradients if these are written too, have changed.

        As after torch's own operations, a backward through what it saved of them before fails.
        Torch's way takes 0.1 us and more for each, as what counts is no longer in the cache.
        """
        native = library() if self.native else None
        if native is None or not native.note_written(native.torch, self.native, grads):
            params = self.bucket.params
            increment_version([*params, *(p.grad for p in params if grads and p.grad is not None)])

    def _check(self) -> None:
        """See that what is found natively is what Python finds."""
        grads = [p.grad.data_ptr() for p in self.bucket.params if p.grad is not None]
        try:
            self.gather()
        except StaleError:
            grads = []
        if grads != [self._grads[i] for i in self.places]:
            raise UnsupportedError(f"torch {torch.__version__} keeps addresses elsewhere")

    def set_grad(self, index: int, address: int) -> None:
        """Let ``address`` be that of a parameter's gradient."""
        self.addresses[self.grads.start + index] = address
        self._grads[self.places[index]] = address

    def extended(self, bucket: Bucket) -> Table:
        """The table of ``bucket``, which is this one's with more state, for the same gradients."""
        grads = [self._grads[i] for i in self.places]
        table = Table(bucket, self.places, self._grads)
        for index, grad in enumerate(grads):  # of copies, perhaps
            table.set_grad(index, grad)
        return table

    def _set_row(self, row: int, addresses: Any) -> None:
        n = len(self.bucket.params)
        self.addresses[row * n : (row + 1) * n] = array("Q", addresses)

    def _struct(self) -> array[int]:
        params, states, keys, kept = (address(o.addresses) for o in self._objects)
        rows, shapes, starts, kind = map(address, self._numbers)
        counted = (len(self.bucket.params), len(self._objects[2].objects))
        where = (address(self.places), address(self._grads))
        table = (address(self.addresses), self._grad_row)
        hints = (len(self._lines), address(self._hints), address(self._lines))
        plain = address(self._tags), address(self._plain)
        layouts = (shapes, starts, kind)
        parts = (params, states, keys, kept, rows, *table, *layouts, *where, *hints, *plain)
        return array("q", [*counted, *parts])


def _hints(param: Tensor, state: dict[str, Any]) -> list[tuple[int, int]]:
    """Where what is read of a parameter and its state lies, and how many lines of the cache."""
    native, held = library(), param._cdata
    found = [(id(param), 1), (held, 3), (native.storage_of(held), 1), (native.grad_of(held), 1)]
    for value in state.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            held = value._cdata
            ends = ((held, 1), (native.end_of(held), 1))
            found += [(id(value), 1), *ends, (native.storage_of(held), 1)]
    return found
