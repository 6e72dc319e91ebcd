"""The house's ground plan: every import points down, and there is no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fadapt

ROOT = Path(fadapt.__file__).parent

# From the ground up. A room may import what stands before it; a folder is one room, in which files
# may import each other, without a circle.
FLOORS = (
    ("errors", "seeds", "fusion"),
    ("hugging_face", "batch", "fields", "patterns", "dropout"),
    ("arguments",),
    ("base",),
    ("linalg",),
    ("recomputed", "statistics"),
    ("site",),
    ("method",),
    ("dense_increment",),
    ("adapted_map",),
    ("methods",),
    ("method_json",),
    ("config",),
    ("targeting",),
    ("params",),
    ("io",),
    ("overlay",),
    ("fold",),
    ("run", "merge", "combine", "as_lora"),
    ("merge_many",),
    ("module",),
    ("peft",),
    ("calibration",),
    ("init",),
    ("distributed",),
    ("training",),
    ("testing",),
    ("command",),
)
ORDER = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
# Folders that take part only on the ground: what may stand beneath each of them.
ONLY = {
    "methods": {
        *("errors", "seeds", "linalg", "base", "recomputed", "statistics", "site", "method"),
        *("dense_increment", "adapted_map"),
    },
    "statistics": {"errors", "linalg", "fields"},
}


def modules() -> dict[str, Path]:
    """{dotted name within fadapt: file}."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[str]:
    """The modules of fadapt that one module imports, also lazily and for its types."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = [p for p in package[: len(package) - node.level + 1] if p]
            target = parent + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fadapt":
            target = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            full = ".".join([*target, alias.name])
            found.add(full if full in MODULES else ".".join(target))
    return found - {name}


@pytest.mark.parametrize("name", [m for m in MODULES if m])
def test_imports_point_down(name):
    room = name.split(".")[0]
    if room == "__main__":
        return
    assert room in ORDER, f"{name} has no floor: give its room a place in FLOORS"
    for target in imports_of(name):
        other = target.split(".")[0]
        if other == room:
            continue
        assert ORDER[other] < ORDER[room], f"{name} imports {target}, which stands above it"
        if room in ONLY:
            assert other in ONLY[room], f"{name} imports {target}; {room} needs {ONLY[room]} only"


def test_no_circle():
    graph = {name: imports_of(name) - {""} for name in MODULES if name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
