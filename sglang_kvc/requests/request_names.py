"""What a client calls things: request ids, sessions, adapters, cache keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sglang_kvc.config.checks import check_int, check_text
from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError

MAX_NAME = 4096
"""Characters of a name; it is logged, and sent with every token."""
MAX_RID = 256

# Eight digits begin one random rid in four billion.
_TOO_SHORT = re.compile("[0-9a-f]{0,7}")

_SESSION = {
    "id": str,
    "rid": str,
    "offset": int,
    "replace": bool,
    "drop_previous_output": bool,
}


def check_name(name: str, value: Any, most: int = MAX_NAME) -> None:
    """Raise unless `value` is None or a string of at most `most` characters.

    Raises
    ------
    ConfigError
        With the name and the rule.
    """
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {shown(value)}.")
    if len(value) > most:
        raise ConfigError(
            f"{name} may have at most {most} characters, got {len(value)}."
        )
    check_text(name, value)


def check_rid(rid: Any) -> None:
    """Raise unless `rid` names a request and could be nobody else's.

    Raises
    ------
    ConfigError
        With the rule.
    """
    check_name("rid", rid, MAX_RID)
    if rid is not None and _TOO_SHORT.fullmatch(rid):
        raise ConfigError(
            f"rid={shown(rid)} could begin the rid of another request, 32 hexadecimal "
            "digits unless given, and SGLang aborts all that begin like the one to be "
            "aborted. Use more characters or other letters, for example job-1."
        )


def check_session(params: Any) -> None:
    """Raise unless `params` are SGLang's ``session_params``, or None.

    Raises
    ------
    ConfigError
        With the key and the rule.
    """
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise ConfigError(f"session_params must be an object, got {shown(params)}.")
    for name, value in params.items():
        kind = _SESSION.get(name) if isinstance(name, str) else None
        if kind is None:
            raise ConfigError(
                f"Unknown key {shown(name)} in session_params. Valid: "
                f"{', '.join(_SESSION)}."
            )
        if value is None:
            continue
        if kind is int:
            check_int(f"session_params.{name}", value, -1)
        elif kind is str:
            check_name(f"session_params.{name}", value)
        elif not isinstance(value, bool):
            raise ConfigError(
                f"session_params.{name} must be true or false, got {shown(value)}."
            )
