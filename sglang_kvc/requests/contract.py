"""What SGLang says of a JSON body that it refuses, no longer than what we say.

FastAPI compares a body with a route's fields. From 0.5.22 on SGLang compares that of
``/generate`` with a schema, too: ``invalid type: string "...", expected i64``. Both
happen before we see the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from sglang_kvc.config.shown import MOST, shown

_BEHIND = ", expected "
"""Behind what the client has sent; SGLang's own words follow, which lack it."""
_MOST_ERRORS = 2
_MOST_STEPS, _LONGEST_STEP = 4, 40
"""Of the path to a value."""


def shortened(message: str) -> str:
    """Return the message with at most `MOST` characters before what was expected.

    Parameters
    ----------
    message : str
        It quotes a key or a value of the client in full, between two equal marks.
    """
    found, behind, expected = message.rpartition(_BEHIND)
    if not behind:
        found, expected = message, ""
    if len(found) <= MOST:
        return message
    return f"{found[: MOST - 4]}...{found[-1]}{behind}{expected}"


class BriefValidationError(RequestValidationError):
    """FastAPI's errors of one body with little of what the client has sent.

    The first two are kept, and how many more there were. SGLang answers with the text
    of the error, and with its list if that is another text: here it is the same.

    Parameters
    ----------
    errors : sequence of mapping
        As pydantic makes them: where (`loc`), what is wrong (`msg`, which may quote a
        value), and the value (`input`).
    """

    def __init__(self, errors: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(_first(errors))

    def __str__(self) -> str:
        return str(self.errors())


def _first(errors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = [_brief(error) for error in errors[:_MOST_ERRORS]]
    if len(errors) > _MOST_ERRORS:
        more = f"and {len(errors) - _MOST_ERRORS} more errors"
        kept.append({"type": "more", "loc": (), "msg": more})
    return kept


def _brief(error: Mapping[str, Any]) -> dict[str, Any]:
    short = {
        "type": error.get("type"),
        "loc": tuple(
            step if isinstance(step, int) else str(step)[:_LONGEST_STEP]
            for step in tuple(error.get("loc") or ())[:_MOST_STEPS]
        ),
        "msg": str(error.get("msg") or "")[:MOST],
    }
    values = {key: error.get(key) for key in ("input", "ctx")}
    return short | {key: shown(value) for key, value in values.items() if value}
