"""Rooms of the package: imports point down, never up, and never in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sglang_kvc"
FLOORS = (
    "plugin",
    "attention",
    "runtime",
    "eviction",
    "memory",
    "scheduling",
    "sessions",
    "requests",
    "config",
    "upstream",
    "errors",
)
"""Top to bottom; what is below knows nothing of what is above."""
ASIDE = {
    "tools": {"errors", "config", "upstream", "attention"},
    "frontend": {"config", "requests"},
}
"""Beside the floors: the only rooms that they may import."""
OPEN_TO_ALL = {"kernels", "__init__"}


def module_name(path: Path) -> str:
    """Dotted name below the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, also only for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = node.module
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        prefix = "sglang_kvc."
        inside = (n.removeprefix(prefix) for n in names if n.startswith(prefix))
        found |= {name for name in inside if name in known}
    return found


def graph() -> dict[str, set[str]]:
    """Arrows between modules; packages (`__init__`) count as modules."""
    files = {
        module_name(path): path
        for path in PACKAGE.rglob("*.py")
        if "patches" not in path.parts
    }
    arrows = {name: imports(path, set(files)) for name, path in files.items()}
    # `from package import module` names both: the arrow is to the module.
    return {
        name: {t for t in targets if not any(o.startswith(f"{t}.") for o in targets)}
        for name, targets in arrows.items()
    }


def room(module: str) -> str:
    """First part of a module's name."""
    return module.partition(".")[0]


def arrows_between_rooms() -> set[tuple[str, str]]:
    return {
        (room(source), room(target))
        for source, targets in graph().items()
        for target in targets
        if room(source) != room(target)
    }


def test_every_module_is_in_a_room() -> None:
    rooms = {room(name) for name in graph()}
    assert rooms == {*FLOORS, *ASIDE, "__init__"}


def test_no_arrow_climbs() -> None:
    climbing = [
        (source, target)
        for source, target in arrows_between_rooms()
        if source in FLOORS
        and target not in OPEN_TO_ALL
        and FLOORS.index(target) <= FLOORS.index(source)
    ]
    assert not climbing
    for source, allowed in ASIDE.items():
        used = {b for a, b in arrows_between_rooms() if a == source}
        assert used <= allowed, source


def test_no_circle_of_modules() -> None:
    arrows = graph()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for target in arrows[name]:
            visit(target, (*path, name))
        done.add(name)

    for name in arrows:
        visit(name, ())


@pytest.mark.parametrize("name", ["config", "requests"])
def test_what_a_user_may_say_is_known_without_torch_and_sglang(name: str) -> None:
    """Both are needed where importing SGLang would cost ten seconds."""
    for path in (PACKAGE / name).glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not any(n.split(".")[0] in ("torch", "sglang") for n in names), path


def test_kernels_know_nothing_of_the_rooms() -> None:
    for path in (PACKAGE / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                name = node.module
                ours = name.startswith("sglang_kvc")
                assert not ours or name.startswith("sglang_kvc.kernels"), path
                assert not name.startswith("sglang."), path


def test_a_climbing_arrow_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sglang_kvc"
    for name in ("config", "memory"):
        (package / name).mkdir(parents=True)
    (package / "config/a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from sglang_kvc.memory.b import B\n"
    )
    (package / "memory/b.py").write_text("from sglang_kvc.config import a\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", package)
    with pytest.raises(AssertionError):
        test_no_arrow_climbs()
    with pytest.raises(AssertionError):
        test_no_circle_of_modules()
