"""Rooms of bench/: no room imports another one, and nothing imports in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
COMMON = "common"
ROOMS = {"serving", "kernels", "quality", "soak", "features"}
PROGRAMS = {"gpu_check", "visit"}
"""Beside the rooms: they start the rooms' commands and import `COMMON` only."""


def module_name(path: Path) -> str:
    """Dotted name below bench/."""
    parts = path.relative_to(BENCH).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of bench/ that a file imports, also only for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            base = node.module or ""
            # `from package import module`: the arrow is to the module.
            named = [(f"{base}.{alias.name}", base) for alias in node.names]
        else:
            continue
        for full, base in named:
            if not full.startswith("bench."):
                continue
            names = [name.removeprefix("bench.") for name in (full, base)]
            target = next((name for name in names if name in known), None)
            assert target, f"{path}: no module {base}"
            found.add(target)
    return found


def graph() -> dict[str, set[str]]:
    """Arrows between modules."""
    files = {module_name(path): path for path in BENCH.rglob("*.py")}
    return {name: imports(path, set(files)) for name, path in files.items()}


def room(module: str) -> str:
    """First part of a module's name."""
    return module.partition(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(name) for name in graph()} == {COMMON, *ROOMS, *PROGRAMS}


def test_rooms_import_only_what_they_share() -> None:
    crossing = [
        (source, target)
        for source, targets in graph().items()
        for target in targets
        if room(target) not in (room(source), COMMON)
    ]
    assert not crossing


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


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_every_room_has_a_command_and_says_what_it_is(name: str) -> None:
    assert (BENCH / name / "__main__.py").exists()
    said = ast.get_docstring(ast.parse((BENCH / name / "__init__.py").read_text()))
    assert said and f"python -m bench.{name}" in said


@pytest.mark.parametrize("other", ["kernels", "common"])
def test_a_crossing_arrow_and_a_circle_would_be_seen(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("serving", other):
        (tmp_path / name).mkdir()
    (tmp_path / "serving/a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        f"    from bench.{other}.b import B\n"
    )
    (tmp_path / other / "b.py").write_text("from bench.serving import a\n")
    monkeypatch.setattr(f"{__name__}.BENCH", tmp_path)
    with pytest.raises(AssertionError):
        test_rooms_import_only_what_they_share()
    with pytest.raises(AssertionError):
        test_no_circle_of_modules()
