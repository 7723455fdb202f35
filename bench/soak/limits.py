"""What a load has to know of its server, and what surely fits into it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.server import Server

MIN_BUDGET = 512
"""Charged for requests with a rate, whatever the server's minimum is below it."""
MARGIN = 512


@dataclass(frozen=True)
class Limits:
    """What the load has to know of the server.

    Parameters
    ----------
    pool, chunk : int
        Tokens of the KV pool and of a prefill chunk (0 or less: no chunks).
    context : int
        Most tokens of a prompt and its output.
    vocab : int
        Token ids are below this.
    text : bool
        Whether the server has a tokenizer; without one there is no OpenAI API.
    structured : bool
        Whether JSON schemas and regular expressions are served.
    folds : bool
        Whether prompts are compressed between their chunks.
    priority : bool
        Whether requests have priorities.
    """

    pool: int
    chunk: int
    context: int
    vocab: int
    text: bool
    structured: bool
    folds: bool
    priority: bool


def limits_of(server: Server, structured: bool | None) -> Limits:
    """What the load has to know; `structured` None: on with a tokenizer."""
    info = server.get("/server_info")
    model = Path(info["model_path"])
    text = not info["skip_tokenizer_init"]
    config: dict[str, Any] = {}
    if (model / "config.json").exists():
        config = json.loads((model / "config.json").read_text())
    command = server.process.args if server.process else []
    words = [str(word) for word in command] if isinstance(command, list) else []
    never = "never" in words or "--kv-compress-chunks=never" in words
    return Limits(
        pool=info["max_total_num_tokens"],
        chunk=info["chunked_prefill_size"] or 0,
        context=info["max_req_input_len"],
        vocab=config.get("vocab_size", 1000),
        text=text,
        structured=text and structured is not False,
        folds=not never,
        priority=info["enable_priority_scheduling"],
    )


def surely_fits(
    limits: Limits, length: int, output: int, option: dict[str, Any] | None
) -> bool:
    """Whether any sound server of this size must serve the request in full.

    Deliberately below the server's own bound: what lies between may be refused.
    """
    option = option or {}
    total = length + output
    if total >= limits.context:
        return False
    if option.get("enabled") is False:
        return total + MARGIN < limits.pool
    keep = option.get("budget") or max(
        math.ceil(total / option.get("rate", 4)), MIN_BUDGET
    )
    keep = min(keep, total)
    if length + keep + MARGIN < limits.pool and 2 * keep + MARGIN < limits.pool:
        return True
    folded = 3 * keep + limits.chunk + 2 * MARGIN
    return limits.folds and limits.chunk > 0 and folded < limits.pool
