"""Print the findings as plain tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sglang_kvc.tools.upstream_diff.compare import Row, Status


def table(rows: Iterable[Row]) -> list[str]:
    """Lines with aligned columns: name, status, place, detail."""
    cells = [(row.name, row.status.value, row.where, row.detail) for row in rows]
    widths = [max((len(cell[i]) for cell in cells), default=0) for i in range(3)]
    lines = []
    for cell in cells:
        columns = [text.ljust(width) for text, width in zip(cell, widths, strict=False)]
        lines.append("  ".join(["", *columns, cell[3]]).rstrip())
    return lines


def section(title: str, rows: list[Row], all_rows: bool = False) -> list[str]:
    """A title, the rows that need work, and how many do not.

    Parameters
    ----------
    title : str
    rows : list of Row
    all_rows : bool
        Print also the rows that need no work.
    """
    shown = [row for row in rows if all_rows or row.status.needs_work]
    quiet = Counter(row.status.value for row in rows if not row.status.needs_work)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(quiet.items()))
    lines = ["", title, *table(shown)]
    if not all_rows and counts:
        lines.append(f"  {counts}")
    return lines


def diffs(rows: Iterable[Row]) -> list[str]:
    """What has changed in each row, as a unified diff without comments."""
    lines = []
    for row in rows:
        if row.diff and row.status.needs_work:
            lines += ["", f"--- {row.name}: {row.where}", *row.diff]
    return lines


def summary(patches: list[Row], others: list[Row]) -> list[str]:
    """Names of the patches that need work, and how much else does."""
    by_status: dict[Status, list[str]] = {}
    for row in patches:
        if row.status.needs_work:
            by_status.setdefault(row.status, []).append(row.name)
    rest = sum(row.status.needs_work for row in others)
    if not by_status and not rest:
        return ["", "Nothing needs work."]
    lines = ["", "Needs work:"]
    for status in (Status.GONE, Status.SIGNATURE, Status.MOVED):
        lines += [
            f"  adapt {name} ({status.value})" for name in by_status.get(status, [])
        ]
    lines += [
        f"  read {name} (body changed)" for name in by_status.get(Status.BODY, [])
    ]
    if rest:
        lines.append(f"  and {rest} lines of the other tables")
    return lines
