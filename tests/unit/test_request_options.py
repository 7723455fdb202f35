"""Options of one request: every mistake is a ConfigError for its sender."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sglang_kvc.errors import ConfigError
from sglang_kvc.options import KVCompressOptions
from sglang_kvc.request_options import (
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
        ({"rate": 8}, RequestOptions(rate=8)),
        ({"rate": 1.0}, RequestOptions(rate=1.0)),
        ({"budget": 1024}, RequestOptions(budget=1024)),
        ({"budget": 33}, RequestOptions(budget=33)),
        ({"enabled": False}, RequestOptions(enabled=False)),
        ({"enabled": True, "rate": 2}, RequestOptions(rate=2)),
        ({"report_heads": True}, RequestOptions(report_heads=True)),
        ({"rate": None}, RequestOptions()),
    ],
)
def test_accepted(asked: dict[str, Any], expected: RequestOptions) -> None:
    assert parse(asked) == expected


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
        ({"enabled": 1}, "true or false"),
        ({"enabled": "no"}, "true or false"),
        ({"enabled": None}, "true or false"),
        ({"report_heads": 1}, "report_heads must be true or false"),
        ({"enabled": False, "rate": 8}, "drop one of them"),
    ],
)
def test_refused(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(asked)


@pytest.mark.parametrize(
    ("request_options", "expected"),
    [
        (RequestOptions(), 1024),
        (RequestOptions(rate=2), 2048),
        (RequestOptions(rate=64), 512),
        (RequestOptions(budget=100), 112),
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
