"""From recorded figures to what `bench.plot` draws: which ones count, and where."""

from __future__ import annotations

from typing import Any

from bench.loads import LOADS, OURS, STOCK
from bench.report import summarize

Record = dict[str, Any]
Lines = dict[str, list[tuple[float, float]]]
"""(rate, figure) by load, ascending."""
BARS = {
    ("decode_attention", "packed"): "compressed (ours)",
    ("decode_attention", "tail"): "uncompressed (ours)",
    ("fa3_folded", "packed"): "FA3, a sequence per head, same arena",
    ("fa3_stock_page1", "stock"): "FA3, stock layout, page 1",
    ("fa3_stock_page64", "stock"): "FA3, stock layout, page 64",
}


def serve_rows(records: list[Record], commit: str = "") -> list[Record]:
    """Rows of `report.summarize` for the newest or the given commit.

    Stock figures may come from other commits, as in the printed table.
    """
    if commit:
        chosen = [r for r in records if _is_commit(r, commit)]
        if not chosen:
            return []
        others = [r for r in records if not _is_commit(r, commit)]
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


def decode_bars(records: list[Record]) -> dict[str, dict[tuple[str, str], float]]:
    """TB/s of KV read by case and (kernel, layout); the last measurement counts."""
    bars: dict[str, dict[tuple[str, str], float]] = {}
    for record in records:
        key = (record["kernel"], record.get("layout", ""))
        if record["section"] == "decode" and key in BARS and "tb_s" in record:
            bars.setdefault(record["case"], {})[key] = record["tb_s"]
    return bars


def of_commit(records: list[Record], commit: str = "") -> list[Record]:
    """Records of the given commit, or of the last record's."""
    if not commit and records:
        commit = records[-1]["commit"]
    return [record for record in records if _is_commit(record, commit)]


def _is_commit(record: Record, commit: str) -> bool:
    """The start of an id will do; a dirty tree must be named in full."""
    own: str = record.get("commit", "")
    return own == commit or (own.startswith(commit) and "+" not in own)


def caption_of(records: list[Record]) -> str:
    """Commit, GPU and versions of the last record."""
    last = records[-1]
    versions = last.get("versions") or {}
    words = [f"commit {last['commit']}", str(last.get("gpu"))]
    words += [
        f"{name} {versions[name]}" for name in ("sglang", "torch") if versions.get(name)
    ]
    return ", ".join(words)
