"""Checks of single values, of a server's options and of what a client sends.

Each raises ConfigError with the name, the rule and what was found, whatever the value:
no integer is too large for it, and no message repeats more than a few characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError

MAX_TOKENS = 1 << 30
"""No number of tokens is larger: SGLang's own "no limit", far from int64's end."""
MAX_NUMBER = float(1 << 30)
"""No rate or factor is larger."""


def check_int(name: str, value: Any, low: int, high: int = MAX_TOKENS) -> None:
    """Raise unless `value` is an int (not a bool) within ``[low, high]``.

    Raises
    ------
    ConfigError
        With the name, the rule and the value found.
    """
    number = isinstance(value, Integral) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        rule = (
            f">= {low}, at most {high}" if high == MAX_TOKENS else f"in {low}..{high}"
        )
        raise ConfigError(f"{name} must be an integer {rule}, got {shown(value)}.")


def check_rate(name: str, value: Any) -> None:
    """Raise unless `value` is a real number from 1 to `MAX_NUMBER`.

    Raises
    ------
    ConfigError
        With the name, the rule and the value found.
    """
    if not _is_number(value) or not 1 <= value <= MAX_NUMBER:
        raise ConfigError(
            f"{name} must be a finite number >= 1 (8 keeps one token in eight), at "
            f"most {MAX_NUMBER:.0f}, got {shown(value)}."
        )


def check_number(
    name: str, value: Any, low: float, high: float = MAX_NUMBER, *, above: bool = False
) -> None:
    """Raise unless `value` is a real number from `low`, or above it, to `high`.

    Raises
    ------
    ConfigError
        With the name, the rule and the value found.
    """
    if not _is_number(value) or not low <= value <= high or (above and value == low):
        rule = f"above {low}" if above else f">= {low}"
        raise ConfigError(
            f"{name} must be a finite number {rule}, at most {high:.10g}, got "
            f"{shown(value)}."
        )


def check_choice(name: str, value: Any, valid: Sequence[str]) -> None:
    """Raise unless `value` is one of a few words.

    Raises
    ------
    ConfigError
        With the name, the words and the value found.
    """
    if value not in valid:
        raise ConfigError(
            f"{name} must be one of {', '.join(valid)}, got {shown(value)}."
        )


def check_text(name: str, text: str) -> None:
    """Raise if `text` is not Unicode: a tokenizer cannot encode half a surrogate pair.

    Raises
    ------
    ConfigError
        With the position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} must be valid Unicode, got half a surrogate pair "
            f"({shown(text[error.start])}) at character {error.start}."
        ) from None


def _is_number(value: Any) -> bool:
    # Comparisons of an int with a float are exact whatever its size; nan fails all.
    return isinstance(value, Real) and not isinstance(value, bool)


def check_switch(name: str, value: Any) -> None:
    """Raise unless `value` is true or false.

    Raises
    ------
    ConfigError
        With the name and the value found.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}.")
