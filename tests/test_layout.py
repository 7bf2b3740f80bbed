"""Dependencies point one way: between rooms as the table says, between files anyhow.

``ARROWS`` is the layout of the package; docs/layout.md shows the same table to people.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ARROWS: dict[str, set[str]] = {
    "core": set(),
    "metrics": {"core"},
    "features": {"core"},
    "tangent": {"core", "features"},
    "kernels": {"core", "features", "tangent"},
    "gpytorch_adapter": {"core", "features"},
    "operators": {"core", "features", "kernels"},
    "solvers": {"core", "features", "operators"},
    "posterior": {
        "core",
        "features",
        "kernels",
        "gpytorch_adapter",
        "operators",
        "solvers",
    },
    "training": {
        "core",
        "features",
        "gpytorch_adapter",
        "operators",
        "solvers",
        "posterior",
    },
    "networks": {"core", "metrics", "features", "tangent", "operators", "solvers"},
    "tomography": {
        "core",
        "metrics",
        "features",
        "tangent",
        "operators",
        "solvers",
        "networks",
    },
    "bayesopt": {"core", "operators", "solvers", "posterior", "training"},
    "botorch": {
        "core",
        "features",
        "gpytorch_adapter",
        "operators",
        "solvers",
        "posterior",
    },
    "sklearn": {"core", "features", "solvers", "posterior", "training"},
    "plot": {"core", "metrics", "solvers", "posterior", "networks"},
    "command_line": {"core", "metrics", "sklearn"},
    "__main__": {"command_line"},
}
"""What each room may import, a room only from those above it."""

MODULES = {
    ".".join(
        path.relative_to(ROOT)
        .with_suffix("")
        .parts[: -1 if path.name == "__init__.py" else None]
    ): path
    for path in sorted((ROOT / "sgdgp").rglob("*.py"))
}
"""Paths of the package's modules, by name."""


def room_of(module: str) -> str:
    """The room that a module stands in; "" for the package's own face."""
    return [*module.split("."), ""][1]


def home_of(module: str, name: str) -> str:
    """Where a name comes from that is imported from a module or a room's face."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if MODULES[module].name == "__init__.py":
        for node in TREES[module].body:
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return home_of(node.module, alias.name)
    return module


def imported_modules(tree: ast.AST, module: str) -> Iterator[str]:
    """Modules of the package that are imported anywhere in the tree, for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: expected absolute imports"
            outer = node.module or ""
            names = [home_of(outer, a.name) for a in node.names if outer in MODULES]
        else:
            continue
        yield from (name for name in names if name != module)


TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
IMPORTS = {m: set(imported_modules(tree, m)) for m, tree in TREES.items()}


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_what_the_table_allows(room: str):
    arrows = {
        room_of(target): f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        if room_of(module) == room
        for target in targets
        if room_of(target) != room
    }
    assert [arrows[target] for target in arrows if target not in ARROWS[room]] == []


def test_every_room_is_in_the_table_and_every_arrow_points_up():
    rooms = list(ARROWS)
    assert {room_of(module) for module in MODULES} - {""} == set(rooms)
    for i, room in enumerate(rooms):
        assert ARROWS[room] <= set(rooms[:i])


def test_no_file_is_in_an_import_circle():
    """What is imported from a room's face counts as imported from where it stands."""
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", MODULES)
def test_nothing_of_the_package_is_imported_in_a_function(module: str):
    inner = [
        target
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for target in imported_modules(node, module)
    ]
    assert inner == []


def test_the_layout_page_shows_the_table():
    shown = {}
    for line in (ROOT / "docs" / "layout.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `sgdgp/") and len(cells) == 3:
            room = cells[0].strip("`").removeprefix("sgdgp/").strip("/")
            shown[room.removesuffix(".py")] = {
                name.strip(" `") for name in cells[2].split(",") if name.strip(" `-")
            }
    assert shown == ARROWS
