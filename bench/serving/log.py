"""What SGLang's log says about a run and about a start."""

from __future__ import annotations

import re
from collections import Counter
from statistics import median
from typing import Any

DECODE = re.compile(
    r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)"
)
PREFILL = "Prefill batch"
REPLICA = re.compile(r"\bDP(\d+)\b.*Prefill batch.*?#new-seq: (\d+)")
RETRACT = "KV cache pool is full. Retract requests"
METADATA = "KV-Compress metadata: "
POOL = re.compile(r"max_total_num_tokens=(\d+)")
FEW_LINES = 3


def parse_log(text: str) -> dict[str, Any]:
    """Figures of one run from the lines that SGLang logged during it.

    Returns
    -------
    dict
        ``largest_batch``; ``retractions``; ``decode_step_ms``, the median over the
        lines with the largest batch, and ``decode_step_lines``, their number. A line's
        throughput covers all time since the line before, so lines with a prefill in
        between are left out unless too few others remain. ``replicas``, with data
        parallel only: prompts, or chunks of them, that each replica has prefilled.
    """
    steps: list[tuple[int, float, bool]] = []
    prefilled = True  # the first line reaches back to before the run
    for line in text.splitlines():
        if PREFILL in line:
            prefilled = True
        elif (found := DECODE.search(line)) and float(found[2]) > 0:
            batch = int(found[1])
            steps.append((batch, 1000 * batch / float(found[2]), prefilled))
            prefilled = False
    largest = max((batch for batch, _, _ in steps), default=0)
    full = [(ms, mixed) for batch, ms, mixed in steps if batch == largest]
    clean = [ms for ms, mixed in full if not mixed]
    chosen = clean if len(clean) >= FEW_LINES else [ms for ms, _ in full]
    replicas: Counter[str] = Counter()
    for replica, prompts in REPLICA.findall(text):
        replicas[replica] += int(prompts)
    return {
        **({"replicas": dict(replicas)} if replicas else {}),
        "largest_batch": largest,
        "decode_step_ms": median(chosen) if chosen else None,
        "decode_step_lines": len(chosen),
        "decode_step_clean": len(clean) >= FEW_LINES,
        "retractions": text.count(RETRACT),
    }


def parse_start(text: str) -> dict[str, Any]:
    """Our metadata line and the size of the pool, from the log of the start."""
    line = next((one for one in text.splitlines() if METADATA in one), "")
    pool = POOL.search(text)
    return {
        "metadata": line.partition(METADATA)[2],
        "pool_tokens": int(pool[1]) if pool else None,
    }
