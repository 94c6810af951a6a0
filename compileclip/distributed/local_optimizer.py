"""An optimizer of the parts that this rank holds of another one's parameters.

Programs are elementwise, so what they do to a ``DTensor`` is what they do to its parts. Here they
find these as plain tensors, called views: the parts themselves, with the parts of gradients and
state for as long as a step takes. Plain parameters are their own views.

Most steps find all as it was, which thousands of parameters are asked in C, by their identities.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from compileclip.distributed.shards import as_placed, is_sharded, local
from compileclip.distributed.views import has_view, mark, placed_alike, same_memory, whole_of

_OWN = ("param_groups", "state")
_part, _spec, _grad = attrgetter("_local_tensor"), attrgetter("_spec"), attrgetter("grad")


class LocalOptimizer:
    """The local parts of an optimizer's parameters, as an optimizer.

    Attributes:
        optimizer: of the same class, with the same hyperparameters; not a copy but a view, which
            ``gradients`` brings up to date.
        params: the parameters, each once; another list where they or their placements change.
    """

    def __init__(self, optimizer: Optimizer, marks: bool) -> None:
        """Know nothing yet.

        Args:
            optimizer: whose parameters ranks hold parts of.
            marks: whether its step may ask for attributes of parameters, as a class may that is
                not torch's; views have them, too.
        """
        self._of, self._marks = optimizer, marks
        self.optimizer: Any = object.__new__(type(optimizer))
        self.params: list[Tensor] = []
        self._sharded: list[Any] = []  # those of them that are a DTensor
        self._sharded_views: list[Tensor] = []
        self._specs: list[Any] = []  # how these are placed
        self._objects = array("Q")  # where they and their views are
        self._stepped: list[Any] = []  # those that have a gradient in this step
        self._others: list[Tensor] = []  # those that are a DTensor, and have no view
        self._views: dict[Tensor, Tensor] = {}  # of each parameter, its view or itself
        self._whole: dict[Tensor, Tensor] = {}  # the other way round
        self._parts: dict[tuple[Tensor, str], tuple[Tensor, Tensor]] = {}  # of state, with whole
        self._counts: list[int] = []  # of the parameters of each group
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
        self._fetch()
        if self._has_changed():
            self._rebuild()
        self._follow_groups()
        if self._marks:
            for p, view in zip(self._sharded, self._sharded_views, strict=True):
                mark(view, p)
        replaced: list[tuple[Tensor, Tensor]] = []
        try:
            if not self._give_gradients():
                self._place_gradients(replaced)
            yield
        finally:
            deque(map(setattr, self._sharded_views, repeat("grad"), repeat(None)), maxlen=0)
            if not written:
                for p, grad in replaced:
                    p.grad = grad

    def _fetch(self) -> None:
        from compileclip.native.native_tensors import address, has_library, library

        if self._objects and has_library():
            native = library()
            native.fetch(native.torch, address(self._objects), len(self._objects))

    def _give_gradients(self) -> bool:
        """Give views the parts of gradients; False where not all are there and placed alike."""
        self._stepped = self._sharded
        if self._others:
            return False
        try:
            grads = list(map(_grad, self._sharded))
            if any(map(is_not, map(_spec, grads), self._specs)):
                return False  # FSDP2's gradients have the very object of their parameter
            parts = list(map(_part, grads))
            if set(map(type, parts)) - {Tensor}:
                return False
            deque(map(setattr, self._sharded_views, repeat("grad"), parts), maxlen=0)
        except (AttributeError, RuntimeError):  # there is none; or of another dtype
            return False
        return True

    def _place_gradients(self, replaced: list[tuple[Tensor, Tensor]]) -> None:
        """The same one by one; those that are placed anew are noted in ``replaced``."""
        self._stepped = []
        for p in chain(self._others, self._sharded):
            if p.grad is None:
                continue
            grad = as_placed(p.grad, p)
            if grad is not p.grad:
                replaced.append((p, p.grad))
                p.grad = grad
            view, part = self._views[p], local(grad)
            if view is not p:
                self._stepped.append(p)
                if part.dtype != view.grad_dtype:
                    view.grad_dtype = part.dtype
                view.grad = part

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
        increment_version(self._stepped)

    def _has_changed(self) -> bool:
        counts = [len(group["params"]) for group in self._of.param_groups]
        same = bool(self._held) and counts == self._counts
        return not same or _differ(self._consists_of(), self._held)

    def _consists_of(self) -> list[Any]:
        """The parameters, their parts and their state, to be told by identity."""
        groups, state = self._of.param_groups, self._of.state
        params = list(chain.from_iterable(group["params"] for group in groups))
        parts: list[Any] = list(map(_part, self._sharded))
        if self._marks:  # views are other tensors than parts, which may get other memory
            parts += map(same_memory, parts, self._sharded_views)
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
        params = list(dict.fromkeys(p for group in groups for p in group["params"]))
        self._sharded = list(filter(has_view, params))
        self._others = [p for p in params if is_sharded(p) and not has_view(p)]
        specs, self._specs = self._specs, list(map(_spec, self._sharded))
        if _differ(params, self.params) or _differ(specs, self._specs):
            self.params = params
        self._views = {p: self._view(p, before.get(p)) for p in self.params}
        self._sharded_views = [self._views[p] for p in self._sharded]
        self._objects = array("Q", map(id, chain(self._sharded, self._sharded_views)))
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
        self._held, self._counts = self._consists_of(), [len(g["params"]) for g in groups]

    def _view(self, param: Tensor, known: Tensor | None) -> Tensor:
        """What is to stand for ``param``: its part, or where that needs marks another tensor."""
        if not has_view(param):
            return param
        part: Tensor = _part(param)
        if not self._marks:
            return part
        is_one = known is not None and same_memory(part, known) and known.shape == part.shape
        return known if is_one and known is not None else part.detach()

    def _local_state(self, param: Tensor, view: Tensor, held: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in held.items():
            found[name] = value
            if is_sharded(value) and value.dim() > 0 and placed_alike(value, param):
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
                whole = whole_of(value, view, param)
                if whole is not value:
                    self._parts[view, name] = value, whole
            theirs[name] = whole


def _entries(state: Any) -> list[Any]:
    """What the state of an optimizer consists of."""
    held = list(state.values())
    try:
        return [*held, *chain.from_iterable(map(dict.values, held))]
    except TypeError:  # a class of its own keeps something else
        return [*held, *chain.from_iterable(h.values() for h in held if isinstance(h, dict))]


def _differ(now: list[Any], before: list[Any]) -> bool:
    """Whether these are not the same objects."""
    return len(now) != len(before) or any(map(is_not, now, before))
