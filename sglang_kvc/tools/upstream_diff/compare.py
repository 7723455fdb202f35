"""Judge what two releases of SGLang say of the things that we touch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum

from packaging.version import InvalidVersion, Version

from sglang_kvc.tools.upstream_diff import touched
from sglang_kvc.tools.upstream_diff.ours import Needed, Ours, Parameters
from sglang_kvc.tools.upstream_diff.release import CheckError, Release
from sglang_kvc.tools.upstream_diff.symbols import Symbol, find, members, parameters
from sglang_kvc.tools.upstream_diff.texts import (
    amount,
    body_text,
    changed_lines,
    difference,
    head_text,
    shortened,
    signature_text,
)


class Status(Enum):
    """What has become of a thing."""

    UNCHANGED = "unchanged"
    BODY = "body changed"
    SIGNATURE = "signature changed"
    MOVED = "moved"
    GONE = "gone"
    NEW = "new"
    NEITHER = "in neither"
    """Of another generation than the two that are compared; not judged."""

    @property
    def needs_work(self) -> bool:
        """Whether somebody must read or adapt something."""
        return self not in (Status.UNCHANGED, Status.NEITHER)


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Parameters
    ----------
    name : str
        What is judged: a patch file, a symbol, a member, a requirement.
    status : Status
    where : str
        File and line in the newer release, or in the older if it is gone.
    detail : str
        What differs, in few words.
    diff : list of str
        The lines that differ.
    """

    name: str
    status: Status
    where: str = ""
    detail: str = ""
    diff: list[str] = field(default_factory=list, compare=False)


def compare_patches(old: Release, new: Release, ours: Ours) -> list[Row]:
    """One row for each patch file."""
    rows = []
    for needed in ours.patches:
        row = _compare(old, new, needed, needed.needed_by)
        if row.status is Status.SIGNATURE and not needed.allowed:
            # The patch takes whatever comes.
            row = replace(row, status=Status.BODY)
        rows.append(row)
    return rows


def compare_symbols(old: Release, new: Release, ours: Ours) -> list[Row]:
    """One row for each symbol that is used without a hook."""
    rows = []
    for needed in ours.symbols:
        module, _, name = needed.target.partition(":")
        if not find(old, needed.target) and old.parse(f"{module}.{name}"):
            # `from package import module`
            gone = new.parse(f"{module}.{name}") is None
            status = Status.GONE if gone else Status.UNCHANGED
            rows.append(Row(f"{module}.{name}", status))
            continue
        label = f"{module.rpartition('.')[2]}.{name} ({needed.needed_by})"
        rows.append(_compare(old, new, needed, label))
    return rows


def compare_members(old: Release, new: Release, ours: Ours) -> list[Row]:
    """Rows for the classes that we touch, and for each member that we use."""
    tables = {name: _pair(old, new, home) for name, home in touched.HOMES.items()}
    hooked = {needed.target for needed in ours.patches}
    rows: list[Row] = []
    for name, (here, there) in tables.items():
        rows += _compare_head(old, new, name)
        for member in sorted(_used(name, here, ours)):
            if f"{touched.HOMES[name]}.{member}" in hooked:
                continue
            row = _judge(here.get(member), there.get(member), f"{name}.{member}")
            now = [
                other
                for other, (before, after) in tables.items()
                if member in after and member not in before
            ]
            if row.status is Status.GONE and now:
                detail = f"now in {' or '.join(now)}"
                row = replace(row, status=Status.MOVED, detail=detail)
            rows.append(row)
    for target, methods in ours.derived.items():
        here, there = _pair(old, new, target)
        for member in sorted(methods & (set(here) | set(there))):
            label = f"{target.rpartition(':')[2]}.{member}"
            rows.append(_judge(here.get(member), there.get(member), label))
    # A method that we call and replace is one row.
    return list({row.name: row for row in rows}.values())


def compare_new(old: Release, new: Release, ours: Ours) -> Iterator[Row]:
    """Rows for new fields that our config/ and requests/ do not mention."""
    for kind, name in touched.NEW_FIELDS.items():
        here, there = _pair(old, new, touched.HOMES[name])
        for member in sorted(set(there) - set(here) - ours.words):
            symbol = there[member]
            node = symbol.nodes[0]
            is_field = isinstance(node, ast.AnnAssign) and symbol.declared
            if name == "ModelConfig":
                is_field = isinstance(node, (ast.AnnAssign, ast.Assign))
            if is_field and not member.startswith("_"):
                value = getattr(node, "value", None)
                shown = ast.unparse(value) if value is not None else "no default"
                label = f"{kind} {member}"
                yield Row(label, Status.NEW, symbol.where, shortened(shown))


def compare_inherited(old: Release, new: Release, ours: Ours) -> Iterator[Row]:
    """Rows for new methods of the classes that ours derive from."""
    for target, methods in ours.derived.items():
        here, there = _pair(old, new, target)
        for member in sorted(set(there) - set(here) - methods):
            symbol = there[member]
            if symbol.function is not None and not member.startswith("_"):
                name = f"{target.rpartition(':')[2]}.{member}"
                detail = shortened(f"({signature_text(symbol)})")
                yield Row(name, Status.NEW, symbol.where, detail)


def compare_pins(old: Release, new: Release) -> tuple[list[Row], int]:
    """Rows for the requirements that our code meets, and how many others moved.

    Raises
    ------
    CheckError
        If one of the two has no metadata.
    """
    here, there = old.requirements(), new.requirements()
    for release, found in ((old, here), (new, there)):
        if not found:
            raise CheckError(
                f"SGLang {release.version} has no METADATA with its requirements: give "
                "a wheel, or a folder with the sglang-*.dist-info of one."
            )
    moved = sorted(n for n in {*here, *there} if here.get(n) != there.get(n))
    rows = [
        Row(
            name,
            Status.MOVED,
            detail=f"{here.get(name, 'none')} -> {there.get(name, 'none')}",
        )
        for name in moved
        if name in touched.PINS
    ]
    return rows, len(moved) - len(rows)


def _used(name: str, here: dict[str, Symbol], ours: Ours) -> set[str]:
    """Members of a class that we use: those listed, and those our rules name."""
    if name == "ServerArgs":
        declared = {member for member, symbol in here.items() if symbol.declared}
        return ours.members.get(name, set()) | ours.config_words & declared
    if name == "ModelConfig":
        return ours.members.get(name, set()) | ours.model_words & set(here)
    return ours.members.get(name, set())


def _compare(old: Release, new: Release, needed: Needed, label: str) -> Row:
    here, there = find(old, needed.target), find(new, needed.target)
    if not _is_needed(needed, new.version):
        return Row(label, Status.NEITHER)
    return _judge(here, there, label, needed.allowed)


def _is_needed(needed: Needed, version: str) -> bool:
    """Whether we need it of a release; of one that has no number, yes."""
    try:
        found = Version(version)
    except InvalidVersion:
        return True
    begun = not needed.since or found >= Version(needed.since)
    return begun and not (needed.until and found >= Version(needed.until))


def _judge(
    here: Symbol | None,
    there: Symbol | None,
    label: str,
    allowed: tuple[Parameters, ...] = (),
) -> Row:
    if there is None:
        status = Status.GONE if here is not None else Status.NEITHER
        return Row(label, status, here.where if here is not None else "")
    if here is None:
        fits = not allowed or parameters(there) in allowed
        return Row(label, Status.NEITHER if fits else Status.SIGNATURE, there.where)
    diff = changed_lines(body_text(here), body_text(there))
    found, before = parameters(there), parameters(here)
    where = there.where
    if allowed and found not in allowed or not allowed and found != before:
        detail = difference((allowed[-1] if allowed else before) or (), found or ())
        if found is None:
            detail = "no longer a function"
        return Row(label, Status.SIGNATURE, where, shortened(detail), diff)
    if found == before and signature_text(here) != signature_text(there):
        return Row(label, Status.SIGNATURE, where, "other defaults or kinds", diff)
    if not (here.declared or there.declared) or not diff:
        # Where a method sets an attribute is its own affair.
        same_home = (here.module, here.owner) == (there.module, there.owner)
        if same_home or here.owner:
            return Row(label, Status.UNCHANGED, where)
        return Row(label, Status.MOVED, where, f"was in {here.path}")
    detail = amount(diff, body_text(there))
    if here.function is None and here.class_node is None and len(diff) <= 3:
        detail = " ".join(diff[1:])
    return Row(label, Status.BODY, where, shortened(detail), diff)


def _compare_head(old: Release, new: Release, name: str) -> Iterator[Row]:
    """A row if the class is gone or is of another kind, for example no dataclass."""
    here, there = find(old, touched.HOMES[name]), find(new, touched.HOMES[name])
    if here is None or here.class_node is None:
        return
    if there is None or there.class_node is None:
        yield Row(name, Status.GONE, here.where)
        return
    before, after = head_text(here.class_node), head_text(there.class_node)
    if before != after:
        detail = f"{before} -> {after}"
        yield Row(f"class {name}", Status.BODY, there.where, detail)


def _pair(
    old: Release, new: Release, target: str
) -> tuple[dict[str, Symbol], dict[str, Symbol]]:
    found = [(release, find(release, target)) for release in (old, new)]
    first, second = (members(r, s) if s is not None else {} for r, s in found)
    return first, second
