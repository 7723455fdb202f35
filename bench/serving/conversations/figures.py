"""What is made of the turns of one run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.common.percentiles import percentile
from bench.serving.conversations.drive import Turn
from sglang_kvc.config import series

HOST_MEMORY = re.compile(r"([\d.]+) GB host memory")
SHOWN_ERRORS = 10
MOST = 0.9
"""The rest of the turns belongs to the few users who think longest."""
COUNTED = (
    *(series.SNAPSHOTS, series.SNAPSHOT_TOKENS, series.HITS, series.EVICTIONS),
    *(series.IN_HOST, series.BROUGHT_BACK),
)


def summarize(turns: Sequence[Turn], asked: int, begin: float) -> dict[str, Any]:
    """Figures of a run that began at `begin` and was to serve `asked` turns."""
    good = [turn for turn in turns if not turn.error]
    errors = [turn for turn in turns if turn.error]
    seconds = max((turn.last for turn in good), default=begin) - begin
    values: dict[str, Any] = {
        "asked": asked,
        "turns": len(good),
        "complete": len(good) == asked,
        "seconds": seconds,
        "errors": len(errors),
        "first_errors": [
            f"session {it.session}, turn {it.number}: {it.error}"[:300]
            for it in errors[:SHOWN_ERRORS]
        ],
    }
    if not good or seconds <= 0:
        return values
    paces = [(it.answer - 1) / (it.last - it.first) for it in good if it.answer > 1]
    computed = sum(it.prompt - it.cached for it in good)
    values |= {
        "turns_per_s": len(good) / seconds,
        "most_turns_per_s": most_turns_per_s(good, asked, begin),
        "answer_tokens_per_s": sum(it.answer for it in good) / seconds,
        "stream_tokens_per_s": median(paces) if paces else None,
        "prompt_tokens": sum(it.prompt for it in good),
        "computed_over_new": computed / sum(it.new for it in good),
        "turn_1": part([turn for turn in good if turn.number == 1]),
        "later": part([turn for turn in good if turn.number > 1]),
        "last_turn_hits": last_turn_hits(good),
    }
    return values | of_ours(good)


def most_turns_per_s(turns: Sequence[Turn], asked: int, begin: float) -> float | None:
    """Turns a second until nine of ten were answered; None if fewer were.

    At the end few users are left, and the one who thinks longest decides how long the
    run takes.
    """
    most = round(MOST * asked)
    if not 0 < most <= len(turns):
        return None
    return most / (sorted(it.last for it in turns)[most - 1] - begin)


def part(turns: Sequence[Turn]) -> dict[str, Any]:
    """Latency and prompt tokens of some turns."""
    waits = [turn.first - turn.begin for turn in turns]
    prompt = sum(turn.prompt for turn in turns)
    cached = sum(turn.cached for turn in turns)
    new = sum(turn.new for turn in turns)
    return {
        "turns": len(turns),
        "first_token_p50_s": percentile(waits, 0.5),
        "first_token_p99_s": percentile(waits, 0.99),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "computed_tokens": prompt - cached,
        "new_tokens": new,
        "computed_over_new": (prompt - cached) / new if new else None,
    }


def last_turn_hits(turns: Sequence[Turn]) -> float | None:
    """Share of the sessions, branches apart, whose last turn found its history.

    More than half of it: a page or a window at its end is always computed again.
    """
    last: dict[tuple[int, int], Turn] = {}
    for turn in turns:
        who = turn.session, turn.branch
        if who not in last or turn.number > last[who].number:
            last[who] = turn
    later = [turn for turn in last.values() if turn.number > 1]
    if not later:
        return None
    return sum(it.cached > (it.prompt - it.new) / 2 for it in later) / len(later)


def of_ours(turns: Sequence[Turn]) -> dict[str, Any]:
    """What our plugin says of its turns; nothing where there is none."""
    told = [turn.ours for turn in turns if turn.ours]
    if not told:
        return {"reported": 0}
    resumed = [one.get("resumed_tokens") or 0 for one in told]
    return {
        "reported": len(told),
        "resumed_turns": sum(map(bool, resumed)),
        "resumed_tokens": sum(resumed),
        "resident_tokens": sum(one["resident_tokens"] for one in told) / len(told),
        "logical_tokens": sum(one["logical_tokens"] for one in told) / len(told),
        "passes": sum(one["passes"] for one in told),
    }


def counters(text: str) -> dict[str, float]:
    """Our series of snapshots in the text of ``/metrics``, by their short names."""
    found: dict[str, float] = {}
    for one in COUNTED:
        lines = [it for it in text.splitlines() if it.startswith(one.name + "{")]
        if lines:
            short = one.name.removeprefix(series.PREFIX).removesuffix("_total")
            found[short] = sum(float(line.split()[-1]) for line in lines)
    return found


def host_cache_gb(log: str) -> float:
    """Host memory that the log of a start names, in its GB."""
    return sum(float(found) for found in HOST_MEMORY.findall(log))


def wrong_side(values: dict[str, Any], stock: bool) -> str:
    """What shows that the wrong code was measured; empty if nothing does."""
    served, reported = values["turns"], values.get("reported", 0)
    if stock and reported:
        return f"{reported} turns of stock SGLang report KV-Compress"
    if not stock and reported != served:
        return f"{served - reported} of {served} turns do not report KV-Compress"
    return ""
