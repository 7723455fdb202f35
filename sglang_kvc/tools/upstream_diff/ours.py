"""What we touch of SGLang, read from our own source without importing it.

Patches and the modules behind them import SGLang, which must not happen here: the one
that is installed is only one of the two that are compared.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_kvc.tools.upstream_diff import touched
from sglang_kvc.tools.upstream_diff.release import CheckError

PACKAGE = Path(__file__).parents[2]
_ROOMS = ("attention", "config", "eviction", "memory", "requests", "scheduling")
_IDENTIFIERS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

Parameters = tuple[str, ...] | None
"""None: what is no function."""


@dataclass(frozen=True)
class Needed:
    """A symbol of SGLang and who needs it.

    Parameters
    ----------
    target : str
        ``module:qualified.name``.
    needed_by : str
        Our file.
    allowed : tuple of tuple of str
        Parameter lists that we are written for, None for what is no function; empty if
        any that has not changed.
    since, until : str
        First release that we need it of, and first that we no longer need it of; empty
        if there is none.
    """

    target: str
    needed_by: str
    allowed: tuple[Parameters, ...] = ()
    since: str = ""
    until: str = ""


@dataclass
class Ours:
    """All that we touch.

    Parameters
    ----------
    patches : list of Needed
        Hook targets, in the order of the catalogue.
    symbols : list of Needed
        Symbols used without a hook.
    members : dict of str to set of str
        Members by class, the names of `touched.HOMES`.
    derived : dict of str to set of str
        Classes of SGLang that ours derive from, with the methods that ours replace.
    words : set of str
        Names that ``config/`` and ``requests/`` mention: those have been judged.
    config_words, model_words : set of str
        The names that ``config/`` mentions, and those of its file on models.
    """

    patches: list[Needed] = field(default_factory=list)
    symbols: list[Needed] = field(default_factory=list)
    members: dict[str, set[str]] = field(default_factory=dict)
    derived: dict[str, set[str]] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)
    config_words: set[str] = field(default_factory=set)
    model_words: set[str] = field(default_factory=set)


def read_ours(package: Path = PACKAGE) -> Ours:
    """Read our source.

    Raises
    ------
    CheckError
        Naming a file that is missing or is not written as expected.
    """
    ours = Ours(patches=list(_patches(package / "patches")))
    ours.symbols = list(_seams(package / "upstream" / "compat.py"))
    ours.symbols += [Needed(target, "touched.py") for target in touched.SYMBOLS]
    seen = {needed.target for needed in (*ours.symbols, *ours.patches)}
    for path in _sources(package):
        tree = _parse(path)
        imported = _imported(tree)
        name = path.relative_to(package).as_posix()
        for target in imported.values():
            if target not in seen:
                seen.add(target)
                ours.symbols.append(Needed(target, name))
        for target, methods in _derived(tree, imported):
            ours.derived.setdefault(target, set()).update(methods)
    ours.members = _members(package / "upstream" / "types.py")
    config = {p.name: _words(_parse(p)) for p in (package / "config").glob("*.py")}
    requests = [_words(_parse(path)) for path in (package / "requests").glob("*.py")]
    ours.config_words = set().union(*config.values())
    ours.words = ours.config_words.union(*requests)
    ours.model_words = config.get("refusals_model.py", set())
    return ours


def _sources(package: Path) -> list[Path]:
    rooms = [path for room in _ROOMS for path in (package / room).rglob("*.py")]
    found = [*package.glob("*.py"), *rooms, *(package / "upstream").glob("*.py")]
    return sorted([*found, *(package / "patches").glob("*.py")])


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise CheckError(f"Our own {path} cannot be read: {error}") from error


def _patches(folder: Path) -> Iterator[Needed]:
    catalogue = _parse(folder / "catalogue.py")
    groups = [_value(catalogue, name) for name in ("PARENT", "SCHEDULER")]
    for name in [name for group in groups for name in _literal(group, "catalogue")]:
        record = _value(_parse(folder / f"{name}.py"), "PATCH")
        given = {item.arg: item.value for item in getattr(record, "keywords", [])}
        target = _literal(given.get("target"), f"target of patches/{name}.py")
        allowed = _allowed(given.get("expected_params"))
        yield Needed(target, f"{name}.py", allowed, *_span(given, target))


def _seams(path: Path) -> Iterator[Needed]:
    names = ("target", "params", "needed_by")
    for call in getattr(_value(_parse(path), "SEAMS"), "elts", []):
        given = dict(zip(names, call.args, strict=False))
        given |= {item.arg: item.value for item in call.keywords}
        target = _literal(given.get("target"), "target of a seam in compat.py")
        needed_by = _literal(given.get("needed_by"), f"needed_by of {target}")
        allowed = _allowed(given.get("params"))
        yield Needed(target, needed_by, allowed, *_span(given, target))


def _span(given: dict[str, ast.expr], target: str) -> tuple[str, str]:
    first, last = (
        _literal(given[name], f"{name} of {target}") if name in given else ""
        for name in ("since", "until")
    )
    return first or "", last or ""


def _value(tree: ast.Module, name: str) -> ast.expr:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and target.id == name and value:
                return value
    raise CheckError(f"No {name} in one of our own files: adapt {Path(__file__).name}.")


def _literal(node: ast.expr | None, what: str) -> Any:
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise CheckError(
            f"The {what} is not written as a plain value, so it cannot be read without "
            f"importing SGLang. Write it as one, or adapt {Path(__file__).name}."
        ) from error


def _allowed(node: ast.expr | None) -> tuple[Parameters, ...]:
    """Every parameter list in an expression: one, several, or one a generation."""
    if isinstance(node, ast.Dict):
        none = {"None": (None,)}
        lists = (none.get(ast.unparse(it)) or _allowed(it) for it in node.values)
        return tuple(found for each in lists for found in each)
    if not isinstance(node, (ast.Tuple, ast.List)):
        inner = ast.iter_child_nodes(node) if node is not None else ()
        return tuple(
            found
            for child in inner
            if isinstance(child, ast.expr)
            for found in _allowed(child)
        )
    if all(isinstance(item, ast.Constant) for item in node.elts):
        return (tuple(ast.literal_eval(node)),)
    return tuple(found for item in node.elts for found in _allowed(item))


def _imported(tree: ast.Module) -> dict[str, str]:
    """Targets of ``from sglang... import name``, by the name it has here."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").partition(".")[0] == "sglang"
        for alias in node.names
    }


def _derived(
    tree: ast.Module, imported: dict[str, str]
) -> Iterator[tuple[str, set[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            for base in node.bases:
                if ast.unparse(base) in imported:
                    yield imported[ast.unparse(base)], methods


def _members(types: Path) -> dict[str, set[str]]:
    found = {name: set(text.split()) for name, text in touched.MEMBERS.items()}
    for node in _parse(types).body if types.exists() else ():
        if isinstance(node, ast.ClassDef) and node.name in touched.HOMES:
            names = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            fields = (n.target for n in node.body if isinstance(n, ast.AnnAssign))
            names |= {n.id for n in fields if isinstance(n, ast.Name)}
            found.setdefault(node.name, set()).update(names)
    return found


def _words(tree: ast.Module) -> set[str]:
    """Identifiers in strings, those with dots part by part, and attributes read."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _IDENTIFIERS.fullmatch(node.value):
                found.update(node.value.split("."))
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return {name for name in found if not name.startswith("__")}
