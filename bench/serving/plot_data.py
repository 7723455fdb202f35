"""Turn records into what `plot` draws: which figures count, and where."""

from __future__ import annotations

from typing import Any

from bench.common.plotting import is_commit
from bench.serving.loads import LOADS, OURS, STOCK
from bench.serving.report import summarize

Record = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]
"""(rate, figure) by load, ascending."""


def serve_rows(records: list[Record], commit: str = "") -> list[Record]:
    """Rows of `report.summarize` for the newest or the given commit.

    Stock figures may come from other commits, as in the printed table.
    """
    if commit:
        chosen = [r for r in records if is_commit(r, commit)]
        if not chosen:
            return []
        others = [r for r in records if not is_commit(r, commit)]
        # The last record decides which commit is summarized.
        records = others + chosen
    return summarize(records)


def rate_lines(rows: list[Record], key: str) -> Lines:
    """(rate, value) of ours by load, ascending; loads of batches only, with a figure.

    Rows that failed or were refused carry no figure; prefill alone is left out.
    """
    lines: Lines = {}
    for row in rows:
        load = LOADS.get(row["load"])
        if row["system"] != OURS:
            continue
        if load and (load.mode != "run" or load.output_len == 1):
            continue
        if row.get(key) is not None:
            lines.setdefault(row["load"], []).append((row["rate"], row[key]))
    return {load: sorted(points) for load, points in lines.items()}


def stock_levels(rows: list[Record], key: str) -> dict[str, float]:
    """The same figure of stock SGLang, by load."""
    return {
        row["load"]: row[key]
        for row in rows
        if row["system"] == STOCK and row.get(key) is not None
    }
