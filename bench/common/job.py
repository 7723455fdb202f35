"""One request to a server under load, and what it may expect of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

OK, REFUSED, EITHER = "ok", "refused", "either"
"""What a request is expected to end as; `EITHER` where only the server can tell."""
REGEX = "[0-9]{4}-[0-9]{2}"
"""What answers of requests with the pattern "regex" have to match."""


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
