"""Options of one request: every mistake is a ConfigError for its sender."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_kvc.config.keep import Keep
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.errors import ConfigError
from sglang_kvc.requests.request_options import (
    RequestOptions,
    parse_request_options,
    resolve_budget,
    validate_sampling_params,
)

SERVER = KVCompressOptions(rate=4)


def parse(asked: Any) -> RequestOptions:
    """Options from the value of the ``kv_compress`` entry."""
    return parse_request_options({"kv_compress": asked, "other": 1}, SERVER)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, RequestOptions()),
        ({"rate": 8}, RequestOptions(keep=Keep(rate=8))),
        ({"rate": 1.0}, RequestOptions(keep=Keep(rate=1.0))),
        ({"budget": 1024}, RequestOptions(keep=Keep(budget=1024))),
        ({"budget": 33}, RequestOptions(keep=Keep(budget=33))),
        ({"enabled": False}, RequestOptions(enabled=False)),
        ({"enabled": True, "rate": 2}, RequestOptions(keep=Keep(rate=2))),
        ({"report_heads": True}, RequestOptions(report_heads=True)),
        ({"report_tokens": True}, RequestOptions(report_tokens=True)),
        ({"answer": 512}, RequestOptions(answer=512)),
        ({"rate": 8, "answer": 0}, RequestOptions(keep=Keep(rate=8), answer=0)),
        ({"answer": None}, RequestOptions()),
        ({"delay": 32}, RequestOptions(delay=32)),
        ({"rate": 8, "delay": 0}, RequestOptions(keep=Keep(rate=8), delay=0)),
        ({"delay": None}, RequestOptions()),
        ({"rate": None}, RequestOptions()),
    ],
)
def test_accepted(asked: dict[str, Any], expected: RequestOptions) -> None:
    assert parse(asked) == expected


WITH_SESSIONS = KVCompressOptions(rate=4, sessions=True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"keep": "compressed"}, RequestOptions(leaves="compressed")),
        (
            {"keep": "whole", "resume": False},
            RequestOptions(leaves="whole", resume=False),
        ),
        ({"keep": "none", "enabled": False}, RequestOptions(False, leaves="none")),
        ({"resume": True, "rate": 8}, RequestOptions(keep=Keep(rate=8), resume=True)),
        ({"enabled": False, "resume": False}, RequestOptions(False, resume=False)),
    ],
)
def test_what_a_request_says_of_sessions(
    asked: dict[str, Any], expected: RequestOptions
) -> None:
    """Where they are kept; elsewhere it is told that they are not."""
    found = parse_request_options({"kv_compress": asked}, WITH_SESSIONS)
    assert found == expected
    with pytest.raises(ConfigError, match="--kv-compress-sessions"):
        parse(asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"keep": "all"}, "keep must be one of compressed, whole, none"),
        ({"keep": None}, "keep must be one of"),
        ({"keep": ["x" * 3_000_000]}, "keep must be one of"),
        ({"resume": 1}, "resume must be true or false"),
        ({"resume": None}, "resume must be true or false"),
        ({"enabled": False, "keep": "compressed"}, "enabled=false .* keep=compressed"),
        ({"enabled": False, "resume": True}, "enabled=false .* resume=true"),
        ({"report_tokens": True, "resume": True}, "report_tokens .* resume=true"),
    ],
)
def test_what_contradicts_itself_about_sessions(
    asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_request_options({"kv_compress": asked}, WITH_SESSIONS)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, "kv_compress", 7])
def test_not_ours(params: Any) -> None:
    assert parse_request_options(params, SERVER) == RequestOptions()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (None, "must be an object"),
        (8, "must be an object"),
        (True, "must be an object"),
        ([8], "must be an object"),
        ("rate=8", "must be an object"),
        ({"rat": 8}, "Did you mean 'rate'"),
        ({"window": 8}, "Valid: enabled, rate, budget"),
        ({1: 8}, "Unknown key 1"),
        ({"rate": 8, "budget": 1024}, "exclude each other"),
        ({"rate": 0.5}, "rate must be"),
        ({"rate": -1}, "rate must be"),
        ({"rate": math.nan}, "rate must be"),
        ({"rate": math.inf}, "rate must be"),
        ({"rate": True}, "rate must be"),
        ({"rate": "8"}, "rate must be"),
        ({"budget": 32}, "needs at least 48 tokens"),
        ({"budget": 0}, "budget must be"),
        ({"budget": 1024.0}, "budget must be"),
        ({"budget": True}, "budget must be"),
        ({"budget": 2**63}, "budget must be an integer >= 1, at most 1073741824"),
        ({"budget": 2**63 - 64}, "budget must be"),
        ({"budget": -(2**63)}, "budget must be"),
        ({"budget": 10**1000}, "budget must be .* about 1001 digits"),
        ({"rate": 10**1000}, "rate must be .* about 1001 digits"),
        ({"rate": 1e300}, "rate must be"),
        ({"rate": "8" * 3_000_000}, "rate must be"),
        ({"enabled": ["x" * 3_000_000]}, "true or false"),
        ({"x" * 3_000_000: 8}, "Unknown key 'xxx"),
        ({"\ud800": 8}, r"Unknown key '\\ud800'"),
        ({f"rate{i}": 8 for i in range(100_000)}, "has 100000 keys"),
        ("x" * 3_000_000, "must be an object"),
        ([[8] * 1_000_000], "must be an object"),
        ({"enabled": 1}, "true or false"),
        ({"enabled": "no"}, "true or false"),
        ({"enabled": None}, "true or false"),
        ({"report_heads": 1}, "report_heads must be true or false"),
        ({"report_tokens": "yes"}, "report_tokens must be true or false"),
        ({"enabled": False, "rate": 8}, "drop one of them"),
        ({"enabled": False, "answer": 8}, "drop one of them"),
        ({"enabled": False, "delay": 8}, "drop one of them"),
        ({"delay": -1}, "kv_compress.delay must be an integer in 0..4096"),
        ({"delay": 4097}, "kv_compress.delay must be an integer in 0..4096"),
        ({"delay": 1.5}, "delay must be"),
        ({"delay": True}, "delay must be"),
        ({"delay": 10**1000}, "delay must be .* about 1001 digits"),
        ({"answer": -1}, "kv_compress.answer must be an integer >= 0"),
        ({"answer": 1.5}, "answer must be"),
        ({"answer": True}, "answer must be"),
        ({"answer": 10**1000}, "answer must be .* about 1001 digits"),
    ],
)
def test_refused(asked: Any, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError, match=message) as error:
        parse(asked)
    assert time.perf_counter() - start < 0.1
    assert len(str(error.value)) < 400
    str(error.value).encode()


def test_a_delay_needs_a_metric_that_looks_at_queries() -> None:
    server = KVCompressOptions(metric="key_similarity")
    with pytest.raises(ConfigError, match="metric=key_similarity does not look"):
        parse_request_options({"kv_compress": {"delay": 32}}, server)
    off = parse_request_options({"kv_compress": {"delay": 0}}, server)
    assert off.delay == 0
    with pytest.raises(ConfigError, match="delay=32 changes what attention says"):
        KVCompressOptions(metric="key_similarity", delay=32)


NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.builds(pow, st.integers(-20, 20), st.integers(0, 5000)),
    st.floats(),
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
ENTRIES = st.dictionaries(
    st.sampled_from(["enabled", "rate", "budget", "answer", "delay", "bugdet"])
    | st.text(),
    ANYTHING,
    max_size=6,
)


@settings(max_examples=2500, deadline=None)
@given(ENTRIES | ANYTHING, st.integers(0, 1 << 24))
@example({"budget": 1 << 30}, 1 << 24)
@example({"rate": float(1 << 30)}, 1 << 24)
@example({"budget": 9223372036854775808}, 1)
def test_every_value_is_served_or_refused(asked: Any, length: int) -> None:
    """Any other exception would end the scheduler, which parses them too."""
    try:
        options = parse(asked)
    except ConfigError as error:
        assert len(str(error)) < 400
        return
    budget = resolve_budget(options, SERVER, length)
    assert budget is None or SERVER.floor <= budget <= 1 << 30
    if budget is not None:
        # What a scheduler adds to it stays far from the end of int64.
        assert length + 4 * (budget + (1 << 30)) < 1 << 40


@pytest.mark.parametrize(
    ("request_options", "expected"),
    [
        (RequestOptions(), 1024),
        (RequestOptions(keep=Keep(rate=2)), 2048),
        (RequestOptions(keep=Keep(rate=64)), 512),
        (RequestOptions(keep=Keep(budget=100)), 112),
        (RequestOptions(enabled=False), None),
    ],
)
def test_resolve_budget(request_options: RequestOptions, expected: int | None) -> None:
    assert resolve_budget(request_options, SERVER, 4096) == expected


def test_sampling_params_of_http_requests() -> None:
    good = {"temperature": 0, "custom_params": {"kv_compress": {"rate": 8}}}
    bad = {"custom_params": {"kv_compress": {"rate": 0}}}
    for fine in (None, {}, good, [good, good], "nonsense", {"custom_params": None}):
        validate_sampling_params(fine, SERVER)
    for wrong in (bad, [good, bad]):
        with pytest.raises(ConfigError, match="rate"):
            validate_sampling_params(wrong, SERVER)
