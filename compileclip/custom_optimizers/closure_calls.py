"""How often a step calls its closure, by its source.

The wrapper evaluates a closure once, before the norm, and then has the optimizer step without one.
That means the same for steps that would have called it once and that can do without. For others,
such as SAM's, it does not, and they may find out only after they have changed parameters. So before
the first step the paths through the step's source are followed, with a closure and without; what
cannot be read or decided is taken to be in order.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

MANY = 2
_DEPTH = 4  # methods that hand the closure on to each other

_known: WeakKeyDictionary[type[Optimizer], str | None] = WeakKeyDictionary()


def what_a_step_asks_for(kind: type[Optimizer]) -> str | None:
    """What of a closure ``kind.step`` needs that the wrapper has not for it; None if nothing.

    Returns:
        The rest of a sentence that begins with the step's name.
    """
    if str(getattr(kind.step, "__module__", None)).startswith("torch.optim."):
        return None  # as they are known to be
    if kind not in _known:
        _known[kind] = _asked_for(kind)
    return _known[kind]


def _asked_for(kind: type[Optimizer]) -> str | None:
    given, without = (
        [p for p in _paths(kind.__mro__, "step", "closure", has, _DEPTH) if p.end != "raise"]
        for has in (True, False)
    )
    if any(path.calls >= MANY for path in given):
        return "may call its closure more than once"
    return "needs a closure" if given and not without else None


@dataclass(frozen=True)
class _Path:
    """One way through a function, as far as it was followed.

    Attributes:
        calls: how often the closure was called, up to ``MANY``.
        bound: whether the parameter's name still means the closure.
        end: ``""`` while it goes on, else what ended it: return, raise, or loop (break, continue).
    """

    calls: int = 0
    bound: bool = True
    end: str = ""

    def called(self, times: int = 1) -> _Path:
        return replace(self, calls=min(MANY, self.calls + times))


def _paths(
    classes: Sequence[type], method: str, parameter: str | int, given: bool, depth: int
) -> set[_Path]:
    """The ways through the first such method of ``classes``; none where it cannot be read.

    Args:
        classes: where to look, in this order.
        method: its name.
        parameter: the closure's name, or its position.
        given: whether there is a closure, or None in its place.
        depth: how many methods deeper it may be handed on.
    """
    at = next((i for i, cls in enumerate(classes) if method in vars(cls)), None)
    if at is None or depth == 0:
        return set()
    try:
        source = inspect.getsource(inspect.unwrap(vars(classes[at])[method]))
        function = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, TypeError, ValueError, SyntaxError):  # written in C, or in no file
        return set()
    if not isinstance(function, ast.FunctionDef):
        return set()
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    keywords = [arg.arg for arg in function.args.kwonlyargs]
    if isinstance(parameter, int) and parameter < len(names):
        parameter = names[parameter]
    if parameter not in (*names[1:], *keywords):
        return set()
    reader = _Reader(classes, at, names[0], str(parameter), given, depth)
    return reader.block(function.body, {_Path()})


class _Reader:
    """Follows the statements of one method."""

    def __init__(
        self, classes: Sequence[type], at: int, own: str, name: str, given: bool, depth: int
    ) -> None:
        self._classes, self._at, self._depth = classes, at, depth
        self._own, self._name, self._given = own, name, given
        self._others: set[str] = set()  # names of functions that may call it

    def block(self, statements: Iterable[ast.stmt], paths: set[_Path]) -> set[_Path]:
        """Where ``paths`` come to."""
        for statement in statements:
            paths = _each(paths, lambda path, at=statement: self._statement(at, path))
        return paths

    def _statement(self, at: ast.stmt, path: _Path) -> set[_Path]:
        match at:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self._others |= {at.name} if self._given and self._mentioned(at) else set()
                return {path}
            case ast.If():
                return _each(self._value(at.test, path), lambda p: self._branch(at, p))
            case ast.For() | ast.While():
                paths = self._value(at.iter if isinstance(at, ast.For) else at.test, path)
                once = _in_a_loop(self.block(at.body, paths))
                return self.block(at.orelse, paths | once | _in_a_loop(self.block(at.body, once)))
            case ast.With():
                return self.block(at.body, self._values((i.context_expr for i in at.items), path))
            case ast.Try():
                handled = (self.block(handler.body, {path}) for handler in at.handlers)
                paths = self.block(at.orelse, self.block(at.body, {path})).union(*handled)
                return self.block(at.finalbody, paths)
            case ast.Match():
                cases = (self.block(case.body, {path}) for case in at.cases)
                return {path}.union(*cases)
            case ast.Assert() if self._truth(at.test, path) is False:
                return {replace(path, end="raise")}
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() if at.value is not None:
                targets = at.targets if isinstance(at, ast.Assign) else [at.target]
                return {self._assigned(targets, at.value, p) for p in self._value(at.value, path)}
        ends = {ast.Return: "return", ast.Raise: "raise", ast.Break: "loop", ast.Continue: "loop"}
        paths = self._values((e for e in ast.iter_child_nodes(at) if isinstance(e, ast.expr)), path)
        return _each(paths, lambda p: {replace(p, end=ends.get(type(at), ""))})

    def _branch(self, at: ast.If, path: _Path) -> set[_Path]:
        truth, paths = self._truth(at.test, path), set()
        if truth is not False:
            paths |= self.block(at.body, {path})
        if truth is not True:
            paths |= self.block(at.orelse, {path})
        return paths

    def _assigned(self, targets: Sequence[ast.expr], value: ast.expr, path: _Path) -> _Path:
        for target in targets:
            if not isinstance(target, ast.Name) or path.end:
                continue
            if target.id == self._name:
                # As torch.enable_grad()(closure), and of None that is no function either.
                around = isinstance(value, ast.Call) and any(map(self._is_it, value.args))
                kept = around or (self._given and self._mentioned(value))
                path = replace(path, bound=path.bound and kept)
            elif self._given and self._mentioned(value):
                self._others.add(target.id)
        return path

    def _values(self, nodes: Iterable[ast.AST], path: _Path) -> set[_Path]:
        paths = {path}
        for node in nodes:
            paths = _each(paths, lambda p, at=node: self._value(at, p))
        return paths

    def _value(self, at: ast.AST, path: _Path) -> set[_Path]:
        """Where ``path`` comes to by an expression."""
        match at:
            case ast.Lambda():
                return {path}
            case ast.IfExp():
                truth, paths = self._truth(at.test, path), self._value(at.test, path)
                taken = ([at.body] if truth is not False else []) + (
                    [at.orelse] if truth is not True else []
                )
                return set().union(*(_each(paths, lambda p, e=e: self._value(e, p)) for e in taken))
            case ast.BoolOp():
                paths = self._value(at.values[0], path)
                first = self._truth(at.values[0], path)
                if first is not None and first is isinstance(at.op, ast.Or):
                    return paths
                rest = _each(paths, lambda p: self._values(at.values[1:], p))
                return rest if first is not None else paths | rest
            case ast.Call():
                nodes = (at.func, *at.args, *(keyword.value for keyword in at.keywords))
                return _each(self._values(nodes, path), lambda p: self._call(at, p))
        return self._values(ast.iter_child_nodes(at), path)

    def _call(self, at: ast.Call, path: _Path) -> set[_Path]:
        func = at.func
        if isinstance(func, ast.Name) and func.id in self._others:
            return {path.called()}
        if not path.bound:
            return {path}
        # closure(), or torch.enable_grad()(closure)()
        if self._is_it(func) or (isinstance(func, ast.Call) and any(map(self._is_it, func.args))):
            return {path.called() if self._given else replace(path, end="raise")}
        handed: list[str | int] = [i + 1 for i, arg in enumerate(at.args) if self._is_it(arg)]
        handed += [k.arg for k in at.keywords if k.arg is not None and self._is_it(k.value)]
        if not handed or not isinstance(func, ast.Attribute):
            return {path}
        found: set[_Path] = set()
        if isinstance(func.value, ast.Name) and func.value.id == self._own:
            found = _paths(self._classes, func.attr, handed[0], self._given, self._depth - 1)
        elif ast.unparse(func.value).startswith("super("):
            after = self._classes[self._at + 1 :]
            found = _paths(after, func.attr, handed[0], self._given, self._depth - 1)
        if found:
            return {replace(path.called(f.calls), end=f.end.replace("return", "")) for f in found}
        return {path.called() if self._given and func.attr == "step" else path}

    def _truth(self, test: ast.expr, path: _Path) -> bool | None:
        """What ``test`` comes to, as far as it asks whether there is a closure."""
        match test:
            case ast.UnaryOp(op=ast.Not()):
                truth = self._truth(test.operand, path)
                return None if truth is None else not truth
            case ast.BoolOp():
                decides = isinstance(test.op, ast.Or)
                truths = [self._truth(value, path) for value in test.values]
                return decides if decides in truths else None if None in truths else not decides
            case ast.Compare(ops=[ast.Is() | ast.Eq()], comparators=[ast.Constant(value=None)]):
                return not self._given if path.bound and self._is_it(test.left) else None
            case ast.Compare(ops=[ast.IsNot() | ast.NotEq()], comparators=[ast.Constant(None)]):
                return self._given if path.bound and self._is_it(test.left) else None
            case ast.Call(func=ast.Name(id="callable"), args=[asked]):
                return self._truth(asked, path)
        return self._given if path.bound and self._is_it(test) else None

    def _is_it(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self._name

    def _mentioned(self, node: ast.AST) -> bool:
        return any(map(self._is_it, ast.walk(node)))


def _each(paths: Iterable[_Path], further: Any) -> set[_Path]:
    """Those of ``paths`` that go on, led ``further``, and those that have ended."""
    return set().union(*({path} if path.end else further(path) for path in paths))


def _in_a_loop(paths: Iterable[_Path]) -> set[_Path]:
    """Where they come to after a turn."""
    return {replace(path, end="") if path.end == "loop" else path for path in paths}
