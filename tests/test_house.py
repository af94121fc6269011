"""The import graph: rooms import downward only, without a cycle, and nothing of ours is imported inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    *(
        "cli",
        "demo",
        "distill",
        "api",
        "verify",
        "teacher",
        "passes",
        "report",
        "composition",
        "plan",
        "numerics",
        "rules",
    ),
    *("capture", "kernels", "io", "axes", "fxtools"),
)
"""From the top down."""
LEAVES = {"gpd_fx.errors", "gpd_fx.version"}
"""Modules that any room but `kernels` may import."""
FLAT, LINES = 8, 400  # how many files may lie directly in gpd_fx/, and how long a file may be


def modules() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder, package in (("gpd_fx", "gpd_fx"), ("kernels", "gpd_fx.kernels"), ("passes", "gpd_fx.passes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if package == "gpd_fx" and parts[0] in ("kernels", "passes"):
                continue  # links to the other two folders
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imported(node: ast.AST) -> set[str]:
    """The modules of ours that an import statement names."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    found: set[str] = set()
    for name in names:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found


def arrows() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        graph[name] = {target for node in ast.walk(tree) for target in imported(node)} - {name}
    return graph


def room(module: str) -> str | None:
    """The room of a module; None for the files at the top."""
    second = module.removeprefix("gpd_fx").removeprefix(".").split(".")[0]
    return second if second in ROOMS else None


def test_imports_point_down() -> None:
    upward: list[str] = []
    for module, targets in arrows().items():
        for target in targets:
            here, there = room(module), room(target)
            if here is None or (there is None and target in LEAVES and here != "kernels") or here == there:
                continue
            allowed = target == "gpd_fx.losses" and here in ("distill", "demo", "cli")
            if not allowed and (there is None or ROOMS.index(there) <= ROOMS.index(here)):
                upward.append(f"{module} -> {target}")
    assert not upward


def test_no_cycle() -> None:
    graph = arrows()
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> None:
        if module in path:
            pytest.fail(f"a cycle: {' -> '.join([*path[path.index(module) :], module])}")
        if module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_nothing_of_ours_is_imported_inside_a_function() -> None:
    hidden = [
        f"{module}, line {node.lineno}"
        for module, path in MODULES.items()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom) and imported(node)
    ]
    assert not hidden


def test_files_are_small() -> None:
    assert len(list((ROOT / "gpd_fx").glob("*.py"))) <= FLAT
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > LINES}
    assert not long
