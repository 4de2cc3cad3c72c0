"""Which part may import which (the arrows of the design), and no module imports itself in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "imagefs"

LEAVES = {"errors", "native"}
"""For everyone: the types of errors, and the binding of the native code, which import no other part."""

BINDINGS = {"native", "pager", "decode"}
"""Of the native code, which import its extension module."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "native": {"errors"},
    "pager": {"errors"},
    "decode": set(),
    "image": LEAVES,
    "formats": LEAVES | {"image"},
    "store": LEAVES | {"image", "decode"},
    "cache": LEAVES | {"image"},
    "restore": LEAVES | {"image", "pager"},
    "fetch": LEAVES | {"image", "store", "decode"},
    "mount": LEAVES | {"image", "store", "cache", "fetch"},
    "cli": LEAVES | {"image", "formats", "store", "cache", "fetch", "mount", "restore"},
}

DOES_IO = {"asyncio", "http", "mmap", "os", "pathlib", "pyfuse3", "requests", "shutil", "socket", "subprocess"}
DOES_IO |= {"tempfile", "trio", "urllib"}


@dataclass(frozen=True)
class Import:
    """One import statement's one name, absolute."""

    module: str
    line: int
    typing_only: bool


def is_typing_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(tree: ast.AST, package: str, typing_only: bool = False) -> Iterator[Import]:
    """All imports below a node, inside functions too; ``package`` is what relative ones start from."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, typing_only)
        elif is_typing_guard(node):
            assert isinstance(node, ast.If)
            for statement in node.body:
                yield from imports_of(ast.Module([statement], []), package, True)
            for statement in node.orelse:
                yield from imports_of(ast.Module([statement], []), package, typing_only)
        else:
            yield from imports_of(node, package, typing_only)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_package(root: Path) -> dict[str, list[Import]]:
    """Imports by module. Names that are imported from a module are cut to the module."""
    trees = {module_name(path, root): (path, ast.parse(path.read_text(), path)) for path in sorted(root.rglob("*.py"))}
    found = {}
    for name, (path, tree) in trees.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = [
            Import(known, item.line, item.typing_only)
            for item in imports_of(tree, package)
            for known in [item.module if item.module in trees else item.module.rpartition(".")[0] or item.module]
        ]
    return found


def part_of(module: str) -> str | None:
    """The part that a module of the package belongs to; None for other packages, "" for the package itself."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "imagefs" else None


def wrong_arrows(modules: dict[str, list[Import]]) -> list[str]:
    wrong = []
    for name, imports in modules.items():
        part = part_of(name)
        for item in imports:
            target = part_of(item.module)
            # "" is the package itself, which holds its version only; _native belongs to its bindings.
            if target is None or target in ("", part) or (part in BINDINGS and target == "_native"):
                continue
            if part and part not in MAY_IMPORT:
                wrong.append(f"{name}: {part} is a part that the design does not have")
            elif target not in MAY_IMPORT.get(part or "", set()):
                wrong.append(f"{name}:{item.line}: {part or 'the package'} imports {item.module}")
    return wrong


def cycles(modules: dict[str, list[Import]]) -> list[str]:
    """Every circle once, as a path. Imports for type checkers alone do not run, so they make none."""
    graph = {
        name: sorted({i.module for i in imports if i.module in modules and not i.typing_only} - {name})
        for name, imports in modules.items()
    }
    found: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in graph[name]:
                visit(target, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


@pytest.fixture(scope="module")
def modules() -> dict[str, list[Import]]:
    return read_package(PACKAGE)


def test_arrows(modules: dict[str, list[Import]]) -> None:
    assert wrong_arrows(modules) == []


def test_no_cycles(modules: dict[str, list[Import]]) -> None:
    assert cycles(modules) == []


def test_image_does_no_io(modules: dict[str, list[Import]]) -> None:
    used = [
        f"{name}:{item.line}: {item.module}"
        for name, imports in modules.items()
        if part_of(name) == "image"
        for item in imports
        if item.module.partition(".")[0] in DOES_IO and not item.typing_only
    ]
    opened = [
        f"{path.name}:{node.lineno}: open()"
        for path in sorted((PACKAGE / "image").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    ]
    assert used + opened == []


# The checks themselves, on a package that breaks every rule.


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, list[Import]]:
    files = {
        "__init__.py": "",
        "errors.py": "",
        "image/__init__.py": "",
        "image/a.py": "from imagefs.image import b\nfrom imagefs import errors",
        "image/b.py": "from . import c",
        "image/c.py": "def f():\n    from .a import thing",
        "image/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from imagefs.image.e import E",
        "image/e.py": "from imagefs.image.d import D",
        "mount/__init__.py": "from ..formats import raw",
        "restore/door.py": "import imagefs.fetch.view\nif True:\n    from imagefs.store.base import Store",
        "stray.py": "from imagefs.errors import ImagefsError",
    }
    for name, text in files.items():
        path = tmp_path / "imagefs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_package(tmp_path / "imagefs")


def test_wrong_arrows_are_found(broken: dict[str, list[Import]]) -> None:
    assert wrong_arrows(broken) == [
        "imagefs.mount:1: mount imports imagefs.formats",
        "imagefs.restore.door:1: restore imports imagefs.fetch",
        "imagefs.restore.door:3: restore imports imagefs.store.base",
        "imagefs.stray: stray is a part that the design does not have",
    ]


def test_cycles_are_found(broken: dict[str, list[Import]]) -> None:
    assert cycles(broken) == ["imagefs.image.a -> imagefs.image.b -> imagefs.image.c -> imagefs.image.a"]
