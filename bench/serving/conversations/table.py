"""The records of `bench.serving.conversations`, side by side."""

from __future__ import annotations

from typing import Any

from bench.common.plotting import is_commit
from bench.serving.conversations.systems import OURS, SESSIONS, STOCK

Record = dict[str, Any]
ORDER = (STOCK, OURS, SESSIONS)
WIDTHS = (14, 11, 8, 8, 7, 7, 15, 15, 8, 10, 7, 9)
HEAD = [
    "system",
    "pool",
    "turns",
    "turns/s",
    "x",
    "most/s",
    "first_s(1)",
    "first_s(2..)",
    "new_x",
    "decode_t/s",
    "hits",
    "held",
]


LEGEND = (
    "most/s: turns/s until nine of ten are served; the last ones think longest",
    "first_s: seconds to the first token, p50/p99, of turn 1 and of later ones",
    "new_x: prompt tokens computed, over those that were new",
    "hits: sessions whose last turn found its history; held: snapshots at the end",
)


def comparable(records: list[Record], commit: str = "") -> list[Record]:
    """The newest record of each system, of what was served last.

    Compared are records of one shape, pool, model, GPU and version of SGLang. Stock
    figures may come from other commits, unless `commit` has them.
    """
    wanted = [it for it in records if is_commit(it, commit)] if commit else records
    if not wanted:
        return []
    last = wanted[-1]
    keys = ("shape", "pool", "model", "gpu")
    same = [
        one
        for one in records
        if all(one.get(key) == last.get(key) for key in keys)
        and one["versions"] == last["versions"]
    ]
    commit = commit or last["commit"]
    chosen: dict[str, Record] = {}
    for one in same:
        own = is_commit(one, commit)
        name = one["system"]
        if own or (one["stock"] and not is_commit(chosen.get(name, {}), commit)):
            chosen[name] = one
    return sorted(chosen.values(), key=_place)


def _place(record: Record) -> tuple[int, float, str]:
    return ORDER.index(record["kind"]), record["rate"], record["system"]


def failed(record: Record) -> str:
    """Why a record has no figures that count; empty if it has."""
    if record.get("error"):
        lines = str(record["error"]).strip().splitlines()
        # A log's last line says more than that there is one.
        return " ... ".join(dict.fromkeys((lines[0], lines[-1])))
    if record.get("errors"):
        return f"{record['errors']} turns failed: {record['first_errors'][0]}"
    return ""


def format_table(records: list[Record]) -> str:
    """Lines of text: one a system, then what else is worth knowing."""
    if not records:
        return "no records"
    base = next((r for r in records if r["system"] == STOCK and not failed(r)), None)
    lines = [about(records[-1]), _columns(HEAD)]
    for one in records:
        if why := failed(one):
            lines.append(f"{one['system']:<{WIDTHS[0]}} FAILED: {why[:200]}")
            continue
        ratio = one["turns_per_s"] / base["turns_per_s"] if base else None
        hits, held = one.get("last_turn_hits"), one.get("snapshots")
        cells = [
            one["system"],
            str(one["pool_tokens"]),
            f"{one['turns']}{'' if one['complete'] else ' cut'}",
            f"{one['turns_per_s']:.3f}",
            _cell(ratio, 2),
            _cell(one.get("most_turns_per_s"), 3),
            _waits(one["turn_1"]),
            _waits(one["later"]),
            _cell(one["computed_over_new"], 2),
            _cell(one["answer_tokens_per_s"], 0),
            "-" if hits is None else f"{100 * hits:.0f}%",
            _cell(held, 0),
        ]
        lines.append(_columns(cells))
    lines += ["", *LEGEND]
    for one in records:
        if one.get("host_cache_gb"):
            lines.append(f"{one['system']}: {one['host_cache_gb']:.1f} GB host memory")
        if one.get("metadata"):
            lines.append(f"{one['system']}: {one['metadata']}")
    return "\n".join(lines)


def about(record: Record) -> str:
    """The load, in one line."""
    shape = record["shape"]
    return (
        f"{shape['sessions']} sessions x {shape['turns']} turns, {shape['first']} "
        "first, "
        f"{shape['user']} + {shape['answer']} a turn, thinking {shape['think']:g} s, "
        f"{100 * shape['forks']:g} % fork, pool {record['pool']}, {record['model']}"
    )


def _waits(part: dict[str, Any]) -> str:
    p50, p99 = part["first_token_p50_s"], part["first_token_p99_s"]
    return "-" if p50 is None else f"{p50:.2f}/{p99:.2f}"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _columns(cells: list[str]) -> str:
    return " ".join(
        f"{cell:<{width}}" if at == 0 else f"{cell:>{width}}"
        for at, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
