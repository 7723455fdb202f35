"""Patterns of stop_regex: what is accepted is searched in milliseconds."""

from __future__ import annotations

import re
import time

import pytest

from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.stop_regex import MAX_STEPS, check_stop_regex


@pytest.mark.parametrize(
    "pattern",
    [
        r"",
        r"\n\n",
        r"and|or",
        r"\d{1,3}\.",
        r"[A-Z][a-z]{0,20}:",
        r"(?i:end of (text|file))",
        r"^Answer: .{0,60}$",
        r"(yes|no|maybe){1,2}",
        r"[^a]x?",
        r"Q: .{0,200}\n",
    ],
)
def test_ordinary_patterns_are_served(pattern: str) -> None:
    assert check_stop_regex(pattern) <= MAX_STEPS


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a+)+$", "without an end"),
        (r"(a|a)*$x", "without an end"),
        (r"\d+", r"\{1,20\} instead of"),
        (r"a{3,}", "without an end"),
        (r"(a|a){30}x", "too many ways"),
        (r"(a{1,2}){1,60}x", "too many ways"),
        (r"(a?){50}a{50}", "too many ways"),
        (r"a{0,99}a{0,99}a{0,99}b", "too many ways"),
        (r"((a{1,9}){1,9}){1,9}x", "too many ways"),
        (r"(?:){1,999999999}", "too many ways"),
        (r"(a)\1", "back-references"),
        (r"(?=a)b", "look-around"),
        (r"(?<!a)b", "look-around"),
        (r"(", "regular expression"),
        (r"a{99999999999999999999}", "regular expression"),
        (r"(" * 128 + r")" * 128 + "x", "at most 256 characters"),
        (r"x" * 3_000_000, "at most 256 characters, got 3000000"),
    ],
)
def test_refused(pattern: str, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as error:
        check_stop_regex(pattern)
    assert time.perf_counter() - start < 0.5
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|a){8}x",
        r"(a?){6}a{6}x",
        r"a{0,30}a{0,3}b",
        r"(a{1,2}){1,8}x",
        r"((a{1,2}){1,2}){1,3}x",
        r"(a|aa|aaa){1,5}x",
        r"[ab]{0,100}c",
    ],
)
def test_the_worst_accepted_patterns_are_short(pattern: str) -> None:
    """They match nowhere in a text of a's, which is the most that there is to try."""
    check_stop_regex(pattern)
    text = "a" * 4096
    compiled = re.compile(pattern)
    start = time.thread_time()
    assert compiled.search(text) is None
    assert time.thread_time() - start < 0.5
