"""A client's value as an error message shows it: short, on one line, never an error.

A request may carry megabytes, an integer of thousands of digits (which Python refuses
to print), or half a surrogate pair. A message repeats at most `MOST` characters of it,
and no more than that is ever built.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import Any

MOST = 100
"""Characters of a value in a message."""

_ITEMS, _DEPTH = 4, 2
_LONGEST_KEY = 40
"""difflib is quadratic; no name of ours is as long."""
_PRINTABLE_BITS = 256
_DIGITS_PER_BIT = 0.30103


def shown(value: Any) -> str:
    """Return `value` as Python writes it, cut to `MOST` characters.

    Parameters
    ----------
    value : Any
        Anything; its own ``repr`` is called only if it is no container.
    """
    text = _written(value, _DEPTH)
    return text if len(text) <= MOST else f"{text[: MOST - 3]}..."


def suggestion(key: Any, valid: Iterable[str]) -> str:
    """Return a question for the name that `key` resembles, or nothing.

    Parameters
    ----------
    key : Any
        What a client wrote; only a short string is compared.
    valid : iterable of str
        The names that exist.
    """
    if not isinstance(key, str) or len(key) > _LONGEST_KEY:
        return ""
    close = difflib.get_close_matches(key, list(valid), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _written(value: Any, depth: int) -> str:
    if isinstance(value, (str, bytes)):
        return repr(value[:MOST])
    if isinstance(value, int) and value.bit_length() > _PRINTABLE_BITS:
        digits = int(value.bit_length() * _DIGITS_PER_BIT) + 1
        return f"an integer of about {digits} digits"
    if isinstance(value, Mapping):
        pairs = (
            f"{_written(key, depth - 1)}: {_written(item, depth - 1)}"
            for key, item in value.items()
        )
        return _enclosed(pairs, len(value), "{}", depth)
    if isinstance(value, (list, tuple, Set)):
        brackets = {list: "[]", tuple: "()"}.get(type(value), "{}")
        items = (_written(item, depth - 1) for item in value)
        return _enclosed(items, len(value), brackets, depth)
    try:
        return repr(value)
    except Exception:
        return f"<{type(value).__name__}>"


def _enclosed(parts: Iterable[str], count: int, brackets: str, depth: int) -> str:
    left, right = brackets[0], brackets[1]
    if count and depth <= 0:
        return f"{left}...{right}"
    more = ", ..." if count > _ITEMS else ""
    return f"{left}{', '.join(islice(parts, _ITEMS))}{more}{right}"
