"""Values in messages: short, printable, and cheap whatever a client sends."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvc.config.shown import MOST, shown, suggestion


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (0.5, "0.5"),
        ("rate=8", "'rate=8'"),
        ([8], "[8]"),
        ({"rate": "8"}, "{'rate': '8'}"),
        ((1, 2), "(1, 2)"),
        ([], "[]"),
        (list(range(9)), "[0, 1, 2, 3, ...]"),
        ("a\n\x00\ud800", r"'a\n\x00\ud800'"),
        (10**4000, "an integer of about 4001 digits"),
        (nested(5), "[[[...]]]"),
    ],
)
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    "value",
    [
        "x" * 10**8,
        b"x" * 10**8,
        list(range(10**6)),
        {str(i): i for i in range(10**5)},
        {"k" * 10**7: "v" * 10**7},
        nested(100_000),
        -(10**100_000),
    ],
    ids=["str", "bytes", "list", "dict", "key", "deep", "int"],
)
def test_large_values_are_cut_at_once(value: Any) -> None:
    start = time.perf_counter()
    text = shown(value)
    assert time.perf_counter() - start < 0.05
    assert len(text) <= MOST


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_always_one_short_printable_line(value: Any) -> None:
    text = shown(value)
    assert len(text) <= MOST
    assert text.isprintable()
    text.encode()


def test_integers_that_python_does_not_print() -> None:
    assert shown(10**5000) == "an integer of about 5001 digits"
    assert shown({"rate": -(10**5000)}).startswith("{'rate': an integer of about")


def test_suggestion() -> None:
    valid = ("rate", "budget")
    assert suggestion("bugdet", valid) == " Did you mean 'budget'?"
    assert suggestion("zzz", valid) == ""
    assert suggestion(7, valid) == ""
    assert suggestion("rate" * 20, valid) == ""
