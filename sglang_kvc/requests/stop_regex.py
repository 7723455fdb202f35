"""Which patterns of ``stop_regex`` are served: those whose search is short for certain.

SGLang searches the end of a text after every token, in the scheduler, where everybody
waits: one pattern such as ``(a+)+$`` would stop the server for minutes. Python's
engine walks all ways in which a pattern can match before it gives up. So their number
is computed from the pattern, for the worst text, and bounded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError

MAX_CHARACTERS = 256
MAX_STEPS = 1 << 20
"""Steps of one search: a few milliseconds, 30 at worst."""

_CHARACTERS_PER_TOKEN = 16
_AT_ONCE = 16
"""Repeats of a single character that take a step's time."""
_MANY = 1e18

_parser: Any = importlib.import_module(
    "re._parser" if sys.version_info >= (3, 11) else "sre_parse"
)


@dataclass(frozen=True)
class _Cost:
    """Longest match, ways to match, and steps to try them all, from one position."""

    length: float = 0
    ways: float = 1
    steps: float = 1

    def then(self, other: _Cost) -> _Cost:
        """Cost of `other` behind this one: tried again for each way."""
        return _Cost(
            self.length + other.length,
            min(self.ways * other.ways, _MANY),
            min(self.steps + self.ways * other.steps, _MANY),
        )


_ONE = _Cost(length=1)


def check_stop_regex(pattern: str) -> float:
    """Return the steps of one search in the worst text, or raise if they are too many.

    Parameters
    ----------
    pattern : str
        One entry of ``stop_regex``.

    Raises
    ------
    ConfigError
        If it is too long, no pattern, or a search could take long.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise ConfigError(
            f"A stop_regex may have at most {MAX_CHARACTERS} characters, got "
            f"{len(pattern)}. Shorten it, or use several."
        )
    try:
        parsed = _parser.parse(pattern)
    except (_parser.error, OverflowError, RecursionError, ValueError) as error:
        raise ConfigError(
            f"stop_regex must be a regular expression, got {shown(pattern)}: "
            f"{shown(str(error))}."
        ) from None
    cost = _sequence(parsed, pattern)
    # SGLang keeps one token more than the longest match; each character may be a start.
    starts = (cost.length + 1) * _CHARACTERS_PER_TOKEN
    steps = starts * cost.steps
    if steps > MAX_STEPS:
        raise ConfigError(
            f"The stop_regex {shown(pattern)} can match in too many ways: a search "
            f"could take {steps:.0e} steps after every token, at most {MAX_STEPS} are "
            "served. Lower the counts in {...}, or do not repeat what repeats."
        )
    return steps


def _sequence(nodes: Iterable[tuple[Any, Any]], pattern: str) -> _Cost:
    cost = _Cost(steps=0)
    for operator, value in nodes:
        cost = cost.then(_node(str(operator), value, pattern))
    return cost


def _node(operator: str, value: Any, pattern: str) -> _Cost:
    if operator in ("LITERAL", "NOT_LITERAL", "ANY"):
        return _ONE
    if operator == "IN":
        return _Cost(length=1, steps=len(value))
    if operator == "AT":
        return _Cost()
    if operator == "SUBPATTERN":
        return _sequence(value[-1], pattern)
    if operator == "BRANCH":
        parts = [_sequence(part, pattern) for part in value[1]]
        return _Cost(
            max(part.length for part in parts),
            sum(part.ways for part in parts),
            sum(part.steps for part in parts),
        )
    if operator in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = value
        if most == _parser.MAXREPEAT:
            raise ConfigError(
                f"The stop_regex {shown(pattern)} repeats without an end, and is "
                "searched after every token. Bound it: {0,20} instead of *, {1,20} "
                "instead of +."
            )
        return _repeated(_sequence(inner, pattern), int(least), int(most))
    raise ConfigError(
        f"The stop_regex {shown(pattern)} uses {operator.lower()}; back-references, "
        "look-around and atomic groups are not served here. Leave it out."
    )


def _repeated(inner: _Cost, least: int, most: int) -> _Cost:
    """Cost of `least` to `most` times `inner`."""
    if inner == _ONE:
        return _Cost(most, most - least + 1, 1 + most / _AT_ONCE)
    # Each round is a step of its own.
    once = _Cost(inner.length, inner.ways, inner.steps + 1)
    if once.ways == 1:
        return _Cost(most * once.length, most - least + 1, 1 + most * once.steps)
    # With two ways or more this ends soon: what is too much need not be known exactly.
    cost, ways = _Cost(), 1.0 if least == 0 else 0.0
    for count in range(1, most + 1):
        cost = cost.then(once)
        ways += cost.ways if count >= least else 0
        if cost.steps > MAX_STEPS:
            return _Cost(cost.length, _MANY, _MANY)
    return _Cost(cost.length, ways, cost.steps)
