"""Tables over the records of `bench.serving`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from bench.common.record import read_lines
from bench.serving.loads import ABSENT, LOADS, OURS, STOCK

PREFILL_LOAD = "6000x1@all"
"""Its stock figure says how fast a prompt can be read, which bounds any speed-up."""
FIGURES = (
    "seconds",
    "tokens_per_s",
    "requests_per_s",
    "input_tokens",
    "largest_batch",
    "decode_step_ms",
    "retractions",
    "resident_tokens",
    "peak_resident_tokens",
    "passes",
    "deferred_passes",
    "ready_s",
    "memory_idle_mib",
    "memory_peak_mib",
    "itl_median_ms",
    "itl_p99_ms",
    "itl_max_ms",
    "itl_p99_over_median",
)

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """Records of `bench.serving` in a file."""
    return [record for record in read_lines(path) if "engine" in record]


def merge_commits(records: list[Record], commits: str) -> list[Record]:
    """Records of several commits ("a,b"), as if they were one; none: all as they are.

    For measurements that took more than one visit to a GPU. A failure counts unless
    the same run succeeded later.
    """
    wanted = [part for part in commits.split(",") if part]
    if not wanted:
        return records
    chosen = [r for r in records if r.get("commit") in wanted]
    last = {_cell_of(r): r for r in chosen if "load" in r}
    kept = [
        r for r in chosen if not ("error" in r and "error" not in last[_cell_of(r)])
    ]
    good = {r["engine"] for r in kept if "load" in r}
    kept = [r for r in kept if "load" in r or r["engine"] in good]
    return [{**r, "commit": " + ".join(wanted)} for r in kept]


def _cell_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in ("load", "system", "rate"))


def select(records: list[Record]) -> list[Record]:
    """Records of the newest commit, and stock's of others for loads it lacks there.

    Stock runs without the plugin, so its figures outlive our commits. Records of an
    engine whose check failed keep nothing but an error.
    """
    if not records:
        return []
    checks = {one["engine"]: one["ok"] for one in records if "ok" in one}
    runs = []
    for one in (one for one in records if "load" in one):
        one = {**one, "checked": checks.get(one["engine"])}
        if one["checked"] is False:
            one["error"] = one.get("error") or "the engine failed its idle check"
        runs.append(one)
    if not runs:
        return []
    last = runs[-1]
    same = [
        r for r in runs if r["commit"] == last["commit"] and r["gpu"] == last["gpu"]
    ]
    have = {r["load"] for r in same if r["system"] == STOCK and "error" not in r}
    older = [
        r
        for r in runs
        if r["commit"] != last["commit"]
        and r["versions"] == last["versions"]
        and r["system"] == STOCK
        and r["load"] not in have
    ]
    return same + older


def _middle(runs: Iterable[Record], key: str) -> float | None:
    values = [run[key] for run in runs if run.get(key) is not None]
    return median(values) if values else None


def _spread(runs: list[Record], key: str) -> float | None:
    """Half of the range, relative to the median; None for a single run."""
    values = [run[key] for run in runs]
    if len(values) < 2:
        return None
    return (max(values) - min(values)) / 2 / median(values)


def summarize(records: list[Record]) -> list[Record]:
    """One row per load, system and rate, with its ratio to the load's first system."""
    runs = select(records)
    stock = [run for run in runs if run["system"] == STOCK and ok(run)]
    prefill = _middle((r for r in stock if r["load"] == PREFILL_LOAD), "tokens_per_s")
    known = list(LOADS)
    loads = sorted(
        dict.fromkeys(run["load"] for run in runs),
        key=lambda name: known.index(name) if name in known else len(known),
    )
    rows = []
    for load in loads:
        of_load = [run for run in runs if run["load"] == load]
        keys = sorted({(r["system"] == OURS, r["system"], r["rate"]) for r in of_load})
        # "load+option" is compared with what stock did at "load".
        same = (load, load.partition("+")[0])
        good: dict[str, list[Record]] = {name: [] for name in (STOCK, ABSENT)}
        for run in (run for run in runs if run["load"] in same and ok(run)):
            good.get(run["system"], []).append(run)
        base = good[STOCK] or good[ABSENT]
        for _, system, rate in keys:
            group = [r for r in of_load if (r["system"], r["rate"]) == (system, rate)]
            rows.append(_row(load, system, rate, group, base, prefill))
    return rows


def ok(run: Record) -> bool:
    """Whether a run has figures that count."""
    return "error" not in run and "refused" not in run


def _row(
    load: str,
    system: str,
    rate: float,
    group: list[Record],
    base: list[Record],
    prefill: float | None,
) -> Record:
    row: Record = {"load": load, "system": system, "rate": rate}
    # One red run makes the whole cell red: a median must not hide it.
    red = next((run for run in group if not ok(run)), None)
    if red:
        return {**row, "error": red.get("error"), "refused": red.get("refused")}
    row |= {
        "runs": len(group),
        "checked": all(run.get("checked") for run in group),
        "prompts": group[0]["prompts"],
        "spread": _spread(group, "tokens_per_s"),
        "commit": group[0]["commit"],
    }
    for key in FIGURES:
        row[key] = _middle(group, key)
    if "each_s" in group[0]:
        row["each_s"] = [median(one) for one in zip(*(r["each_s"] for r in group))]  # noqa: B905
    if not base or system == base[0]["system"]:
        return row
    stock_rate = _middle(base, "tokens_per_s")
    stock_step = _middle(base, "decode_step_ms")
    assert stock_rate
    # Prompts of a load are alike, so seconds go with tokens.
    row["stock_seconds"] = row["seconds"] * row["tokens_per_s"] / stock_rate
    row["stock_spread"] = _spread(base, "tokens_per_s")
    row["stock_step_ms"] = stock_step
    row["stock_batch"] = _middle(base, "largest_batch")
    row["ratio_to_stock"] = row["tokens_per_s"] / stock_rate
    if row["decode_step_ms"] and stock_step:
        row["step_ratio"] = stock_step / row["decode_step_ms"]
    if prefill:
        row["prefill_bound"] = row["stock_seconds"] * prefill / row["input_tokens"]
    if load in LOADS:
        row["target"] = LOADS[load].targets.get(rate)
        row["step_target"] = LOADS[load].step_targets.get(rate)
    return row


def verdict(row: Record) -> str:
    """Targets of a row, each with "met" or "missed"."""
    parts = []
    for name, aim, found in (
        ("", row.get("target"), row.get("ratio_to_stock")),
        ("step ", row.get("step_target"), row.get("step_ratio")),
    ):
        if aim:
            state = "not measured" if found is None else "met"
            if found is not None and found < aim:
                state = "missed"
            parts.append(f"{name}>= {aim:g} {state}")
    return ", ".join(parts)


def _cell(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_spread(value: float | None, spread: float | None) -> str:
    return _cell(value) + ("" if spread is None else f"±{100 * spread:.0f}%")


HEAD = (
    "load rate n stock_s ours_s ratio bound batch step_ms step_x retr resident target"
)
WIDTHS = (16, 7, 5, 10, 10, 7, 7, 9, 13, 7, 5, 9)


def format_table(rows: list[Record]) -> str:
    """Lines of text: ratios, latencies, first requests, memory, what failed."""
    lines = [_columns(HEAD.split())]
    for row in rows:
        name = ABSENT if row["system"] == ABSENT else f"{row['rate']:g}"
        if row.get("error") or row.get("refused"):
            word = "FAILED" if row.get("error") else "refused"
            text = str(row.get("error") or row["refused"]).strip().splitlines()[0]
            who = f"{row['load']:<16} {row['system']} {name}"
            lines.append(f"{who}: {word}: {text[:90]}")
        elif "ratio_to_stock" in row:
            pair = f"{_cell(row['stock_step_ms'])}/{_cell(row['decode_step_ms'])}"
            cells = [
                row["load"],
                name,
                str(row["prompts"]),
                _with_spread(row["stock_seconds"], row["stock_spread"]),
                _with_spread(row["seconds"], row["spread"]),
                _cell(row["ratio_to_stock"], 3),
                _cell(row.get("prefill_bound"), 2),
                f"{_cell(row['stock_batch'], 0)}/{_cell(row['largest_batch'], 0)}",
                pair,
                _cell(row.get("step_ratio"), 2),
                _cell(row["retractions"], 0),
                _cell(row["resident_tokens"], 0),
                verdict(row) + ("" if row["checked"] else " (idle check not run)"),
            ]
            lines.append(_columns(cells))
        elif row["system"] == OURS:
            lines.append(
                f"{row['load']:<16} {row['system']} {name}: {row['seconds']:.1f} s, "
                f"{row['requests_per_s']:.2f} req/s, nothing to compare with"
            )
    lines += _further(rows)
    return "\n".join(lines)


def _further(rows: list[Record]) -> list[str]:
    lines = ["", "stock_s: scaled to the n prompts of ours; batch, step_ms: stock/ours"]
    for row in rows:
        who = f"{row['load']} {row['system']}"
        if row.get("itl_median_ms"):
            lines.append(
                f"{who}: between tokens median {row['itl_median_ms']:.2f} ms, p99 "
                f"{row['itl_p99_ms']:.2f}, max {row['itl_max_ms']:.2f}, p99/median "
                f"{row['itl_p99_over_median']:.2f}"
            )
        if row.get("each_s"):
            each = row["each_s"]
            lines.append(
                f"{who}: first {each[0]:.3f} s, last {each[-1]:.3f} s, of all: "
                + " ".join(f"{one:.3f}" for one in each)
            )
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        own = [r for r in own if r.get("memory_peak_mib") and r.get("memory_idle_mib")]
        if own:
            lines.append(
                f"memory, {system}: idle {max(r['memory_idle_mib'] for r in own):.0f} "
                f"MiB, peak {max(r['memory_peak_mib'] for r in own):.0f} MiB; ready in "
                f"{median(r['ready_s'] for r in own):.0f} s"
            )
    return lines


def _columns(cells: list[str]) -> str:
    widths = [*WIDTHS, 0]
    return " ".join(
        f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
