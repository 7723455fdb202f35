"""A rate or a budget: exactly one, in its range, and what it keeps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sglang_kvc.config.keep import Keep
from sglang_kvc.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "must be given"),
        ({"rate": 8, "budget": 64}, "rate=8 and budget=64 exclude each other"),
        *[({"rate": bad}, "rate must be") for bad in (0.5, math.nan, "8", True)],
        *[({"budget": bad}, "budget must be") for bad in (0, 64.0, "64", True)],
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keep(**given)


def test_messages_have_the_names_of_the_sender() -> None:
    for given in ({"rate": 0}, {"budget": 0}, {}):
        with pytest.raises(ConfigError, match=r"^mine\.(rate|budget) "):
            Keep(**given, prefix="mine.")
    with pytest.raises(ConfigError, match=r"^mine\.rate=8 and mine\.budget=64 "):
        Keep(8, 64, "mine.")


@pytest.mark.parametrize(
    ("keep", "length", "min_budget", "tokens"),
    [
        (Keep(rate=4), 4096, 1, 1024),
        (Keep(rate=4), 4097, 1, 1040),
        (Keep(rate=4), 100, 500, 512),
        (Keep(rate=1), 1000, 1, 1008),
        (Keep(rate=8), 0, 1, 16),
        (Keep(budget=1000), 10, 2000, 1008),
    ],
)
def test_tokens(keep: Keep, length: int, min_budget: int, tokens: int) -> None:
    assert keep.tokens(length, min_budget) == tokens


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Keep(rate=8).rate = 4  # type: ignore[misc]
