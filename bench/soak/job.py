"""One request of the soak, and what it may expect of a server."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

OK, REFUSED, EITHER = "ok", "refused", "either"
"""What a request is expected to end as; `EITHER` where only the server can tell."""
MIN_BUDGET = 512
"""Charged for requests with a rate, whatever the server's minimum is below it."""
MARGIN = 512
REGEX = "[0-9]{4}-[0-9]{2}"
"""What answers of requests with the pattern "regex" have to match."""


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


@dataclass(frozen=True)
class Job:
    """One request.

    Parameters
    ----------
    index : int
        Its place in the load.
    kind : str
        Its name in the tables.
    path : str
        Where it is sent.
    body : dict or bytes
        JSON.
    expect : {"ok", "refused", "either"}
    stream : bool
    output : int
        Tokens asked for, of each of `n` answers.
    exact : bool
        Whether exactly `output` tokens must come.
    act : {"", "abort", "leave"}
        Abort by id, or close the connection.
    after_events, after_seconds : optional
        When to act.
    short : bool
        Whether a refusal must not repeat what was sent.
    pattern : {"", "json", "regex"}
        What the text must be.
    """

    index: int
    kind: str
    path: str
    body: dict[str, Any] | bytes
    expect: str = OK
    stream: bool = False
    output: int = 0
    n: int = 1
    exact: bool = False
    act: str = ""
    after_events: int | None = None
    after_seconds: float | None = None
    short: bool = False
    pattern: str = ""
    rid: str = ""

    def encoded(self) -> bytes:
        """The body as it is sent."""
        if isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body, separators=(",", ":")).encode()


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
