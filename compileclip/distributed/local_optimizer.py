"""An optimizer of the parts that this rank holds of another one's parameters.

Programs are elementwise, so what they do to a ``DTensor`` is what they do to its parts. Here they
find these as plain tensors: views of the parts, with the parts of gradients and state. Plain
parameters are themselves.

Most steps find all as it was, which thousands of parameters are asked in C, by their identities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from compileclip.distributed.shards import as_placed, is_sharded, local

# An attribute of a view: the shape of the whole parameter, for who asks for more than numbers.
WHOLE_SHAPE = "_compileclip_whole_shape"
_OWN = ("param_groups", "state")
_part, _spec, _grad = attrgetter("_local_tensor"), attrgetter("_spec"), attrgetter("grad")


class LocalOptimizer:
    """The local parts of an optimizer's parameters, as an optimizer.

    Attributes:
        optimizer: of the same class, with the same hyperparameters; not a copy but a view, which
            ``gradients`` brings up to date.
        params: the parameters, each once; another list where they have changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._of = optimizer
        self.optimizer: Any = object.__new__(type(optimizer))
        self.params: list[Tensor] = []
        self._sharded: list[Any] = []  # those of them that are a DTensor
        self._sharded_views: list[Tensor] = []
        self._specs: list[Any] = []  # how these are placed
        self._others: list[Tensor] = []  # those that are a DTensor, and have no view
        self._views: dict[Tensor, Tensor] = {}  # of each parameter, its view or itself
        self._whole: dict[Tensor, Tensor] = {}  # the other way round
        self._parts: dict[tuple[Tensor, str], tuple[Tensor, Tensor]] = {}  # of state, with whole
        self._places: list[int] = []  # the addresses of the parameters' parts
        self._held: list[Any] = []  # what the optimizer consists of, as of the last look
        self._entries: list[Any] = []  # what the views' state consists of
        self._elsewhere: set[Tensor] = set()  # views whose parameters are stepped by themselves

    def view(self, param: Tensor) -> Tensor:
        """What stands for ``param`` here."""
        return self._views.get(param, param)

    def whole(self, view: Tensor) -> Tensor:
        """The parameter that ``view`` stands for."""
        return self._whole.get(view, view)

    def grads(self) -> list[Tensor | None]:
        """Of each parameter, in the order of ``params``, the part of its gradient."""
        found = list(map(_grad, self._views.values()))
        return [None if g is None else local(g) for g in found] if self._others else found

    @contextmanager
    def gradients(self, written: bool) -> Iterator[None]:
        """Within it, views have what their parameters have.

        Args:
            written: whether gradients that have to be placed as their parameters stay so.

        Raises:
            ValueError: a gradient cannot be placed as its parameter. Nothing was changed.
        """
        if self._has_changed():
            self._rebuild()
        self._follow_groups()
        replaced: list[tuple[Tensor, Tensor]] = []
        stepped: list[Tensor] = []
        placed = zip(self._sharded, self._sharded_views, self._specs, strict=True)
        try:
            for p in self._others:
                if p.grad is not None and (grad := as_placed(p.grad, p)) is not p.grad:
                    replaced.append((p, p.grad))
                    p.grad = grad
            for p, view, spec in placed:
                grad = p.grad
                if grad is None:
                    continue
                own = _spec(grad)  # FSDP2's gradients have that of their parameter
                if own is not spec and own.placements != spec.placements:
                    replaced.append((p, grad))
                    p.grad = grad = as_placed(grad, p)
                part = _part(grad)
                stepped.append(view)
                try:
                    view.grad = part if type(part) is Tensor else local(grad)
                except RuntimeError:  # of another dtype than its parameter
                    view.grad_dtype = part.dtype
                    view.grad = local(grad)
            yield
        finally:
            for view in stepped:
                view.grad = None
            if not written:
                for p, grad in replaced:
                    p.grad = grad

    def leave(self, views: Iterable[Tensor]) -> None:
        """Give the optimizer the state of ``views``, with which it is about to step itself."""
        for view in views:
            self._give_state(view)
            self._elsewhere.add(view)

    def forget(self) -> None:
        """What was looked up is no longer so: the optimizer itself has stepped."""
        self._held = []

    def take_over(self, state: bool) -> None:
        """Give the optimizer what a step has left in views: hyperparameters, versions, state.

        Args:
            state: whether state may consist of other objects than before.
        """
        if self._elsewhere:
            self.forget()
        if state and _differ(_entries(self.optimizer.state), self._entries):
            for view in self.optimizer.state.keys() - self._elsewhere:
                self._give_state(view)
            self._entries = _entries(self.optimizer.state)
            self._held = self._consists_of() if self._held else []
        self._elsewhere.clear()
        for mine, group in zip(self.optimizer.param_groups, self._of.param_groups, strict=True):
            group.update((k, v) for k, v in mine.items() if k != "params")
        # A view shares its version with the part; that of the DTensor is another.
        increment_version([p for p in self._sharded if p.grad is not None])

    def _has_changed(self) -> bool:
        return not self._held or _differ(self._consists_of(), self._held)

    def _consists_of(self) -> list[Any]:
        """The parameters, their parts and their state, to be told by identity."""
        groups, state = self._of.param_groups, self._of.state
        params = list(chain.from_iterable(group["params"] for group in groups))
        parts = list(map(_part, self._sharded))
        places = list(map(Tensor.data_ptr, parts))
        if places != self._places:
            self._places = places
            parts = []  # which nothing else is
        return [*params, *parts, *state.keys(), *_entries(state)]

    def _follow_groups(self) -> None:
        own = vars(self.optimizer)
        own.update((k, v) for k, v in vars(self._of).items() if k not in _OWN)
        for mine, group in zip(own["param_groups"], self._of.param_groups, strict=True):
            for name in mine.keys() - group.keys():
                del mine[name]
            mine.update((k, v) for k, v in group.items() if k != "params")

    def _rebuild(self) -> None:
        before, groups = self._views, self._of.param_groups
        self.params = list(dict.fromkeys(p for group in groups for p in group["params"]))
        self._sharded = list(filter(_has_view, self.params))
        self._others = [p for p in self.params if is_sharded(p) and not _has_view(p)]
        self._specs = list(map(_spec, self._sharded))
        self._views = {p: _view(p, before.get(p)) for p in self.params}
        self._sharded_views = [self._views[p] for p in self._sharded]
        self._whole = {view: p for p, view in self._views.items()}
        self._parts.clear()
        state: Any = defaultdict(dict)
        for p, held in self._of.state.items():
            view = self._views.get(p, p) if isinstance(p, Tensor) else p
            state[view] = held if view is p else self._local_state(p, view, held)
        self.optimizer.param_groups = [
            {**group, "params": [self._views[p] for p in group["params"]]} for group in groups
        ]
        self.optimizer.state = state
        self._entries = _entries(state)
        self._places = list(map(Tensor.data_ptr, map(_part, self._sharded)))
        self._held = self._consists_of()

    def _local_state(self, param: Tensor, view: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in held.items():
            found[name] = value
            if is_sharded(value) and value.dim() > 0 and _alike(value, param):
                found[name] = part = local(value)
                self._parts[view, name] = part, value
        return found

    def _give_state(self, view: Tensor) -> None:
        param, mine = self.whole(view), self.optimizer.state.get(view)
        if mine is None or param is view:
            if mine is not None and self._of.state.get(param) is not mine:
                self._of.state[param] = mine
            return
        theirs = self._of.state[param]
        for name in theirs.keys() - mine.keys():
            del theirs[name]
        for name, value in mine.items():
            part, whole = self._parts.get((view, name), (None, None))
            if part is None or part is not value:
                whole = _whole_of(value, view, param)
                if whole is not value:
                    self._parts[view, name] = value, whole
            theirs[name] = whole


def _entries(state: Any) -> list[Any]:
    """What the state of an optimizer consists of."""
    held = [each for each in state.values() if isinstance(each, dict)]
    return [*held, *chain.from_iterable(map(dict.values, held))]


def _differ(now: list[Any], before: list[Any]) -> bool:
    """Whether these are not the same objects."""
    return len(now) != len(before) or any(map(is_not, now, before))


def _has_view(param: Tensor) -> bool:
    """Whether ``param`` is a ``DTensor`` of whose parts kernels can take more than one at a time.

    What is no plain tensor has no memory to look at; in state of a 0-dim one, parts and counts look
    alike.
    """
    return is_sharded(param) and param.dim() > 0 and type(_part(param)) is Tensor


def _view(param: Tensor, known: Tensor | None) -> Tensor:
    """A view of the part of ``param``, the ``known`` one if that still is one; or itself."""
    if not _has_view(param):
        return param
    part = local(param)
    if known is None or known.data_ptr() != part.data_ptr() or known.shape != part.shape:
        known = part.detach().requires_grad_(param.requires_grad)
    vars(known).update(vars(param))
    setattr(known, WHOLE_SHAPE, tuple(param.shape))
    return known


def _alike(value: Tensor, param: Tensor) -> bool:
    """Whether state is distributed as its parameter."""
    assert is_sharded(value)
    assert is_sharded(param)
    same = value.device_mesh == param.device_mesh and value.placements == param.placements
    return same and value.shape == param.shape


def _whole_of(value: Any, view: Tensor, param: Tensor) -> Any:
    """What the optimizer keeps of what a step has made for ``view``."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape != view.shape:
        return value
    if is_sharded(value):
        return value
    assert is_sharded(param)
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        return DTensor.from_local(
            value,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
