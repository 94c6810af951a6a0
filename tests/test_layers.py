"""Imports go one way between packages, from the top of ``LAYERS`` down, and never in a circle."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"", "optimizer", "clipped", "explain", "modes", "wrappable", "double_clipping"}
    | {"step_over_ranks"},
    {"graph"},
    {"multi_tensor"},
    {"custom_optimizers"},
    {"buckets"},
    {"recording"},
    {"passes"},
    {"eager"},
    {"distributed"},
    {"lowering"},
    {"native"},
    {"delegate"},
    {"settings", "fallback", "validation"},
]
MOST_MODULES, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 12, 300, 40


def files() -> Iterator[tuple[str, Path]]:
    """Each module's name within ``compileclip``, and its file."""
    for folder, prefix in ((ROOT / "compileclip", ""), (ROOT / "passes", "passes.")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield (prefix + ".".join(p for p in parts if p != "__init__")).rstrip("."), path


MODULES = dict(files())


def imports(path: Path) -> Iterator[str]:
    """The project's modules that are imported, lazily too, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped or not node.module:
            continue
        package, _, rest = node.module.partition(".")
        if package != "compileclip":
            continue
        for alias in node.names:
            inner = f"{rest}.{alias.name}".lstrip(".")
            yield inner if inner in MODULES else rest


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def layer_of(module: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if module.partition(".")[0] in names)
    return found


def test_imports_go_down() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if layer_of(other) < layer_of(name)
    ]
    assert not wrong


def test_there_is_no_circle() -> None:
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError


def test_packages_and_files_are_small() -> None:
    packages: dict[Path, int] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            packages[path.parent] = packages.get(path.parent, 0) + 1
        lines = len(path.read_text().splitlines())
        assert lines <= MOST_LINES, f"{name} has {lines} lines"
    assert {p.name: n for p, n in packages.items() if n > MOST_MODULES} == {}


def test_functions_are_short() -> None:
    sizes = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert sizes[len(sizes) * 9 // 10] < MOST_LINES_OF_A_FUNCTION


def test_each_package_says_what_it_is_for() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert folder.name in ("compileclip", "passes") or "Read ``" in text, folder
