"""Bounds on sampling_params: what passes, the scheduler can compute with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sglang_kvc.errors import ConfigError, UnsupportedModeError
from sglang_kvc.requests.sampling_fields import INTERNAL, SERVED, check_sampling_params

VOCAB = 1000


@pytest.mark.parametrize(
    "params",
    [
        {},
        dict.fromkeys(set(SERVED) - {"n"}),
        {"max_new_tokens": 0, "min_new_tokens": 0, "n": 1024},
        {"temperature": 0, "top_p": 1e-9, "top_k": -1, "min_p": 1},
        {"top_k": 1 << 30, "max_new_tokens": 1 << 30},
        {"repetition_penalty": 0.001, "frequency_penalty": -2, "presence_penalty": 2},
        {"sampling_seed": (1 << 64) - 1, "stream_interval": 0},
        {"stop": "x", "stop_regex": r"\d{1,3}\.", "stop_token_ids": [0, None, 999]},
        {"stop": [], "stop_regex": [], "stop_token_ids": []},
        {"stop": ["x" * 1024] * 64, "stop_token_ids": [1] * 1024},
        {"logit_bias": {"0": -1e6, "999": 100, 5: 0.5}},
        {"json_schema": '{"a": ' * 60 + "1" + "}" * 60},
        {"regex": "[a-z]?" * 64, "ebnf": "root ::= [a-z]+"},
        {"custom_params": {"kv_compress": {"rate": 8}, "other": [1, {"a": None}]}},
        {"ignore_eos": True, "no_stop_trim": False},
        {"max_new_tokens": np.int64(8), "temperature": np.float32(0.5)},
    ],
)
def test_served(params: dict[str, Any]) -> None:
    check_sampling_params(params, VOCAB)


BAD: list[tuple[str, Any]] = [
    *[
        (name, value)
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "n")
        for value in (-2, 1.5, True, "3", [1], 2**31, 2**63, 10**400)
    ],
    *[("n", value) for value in (None, 0, 1025, 10**9)],
    *[("stream_interval", value) for value in (-1, "a")],
    ("sampling_seed", 10**400),
    *[
        (name, value)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in (math.nan, math.inf, -1, 1e300, 10**400, "1", True, [1.0])
    ],
    ("temperature", 1e7),
    ("top_p", 1e-40),
    ("repetition_penalty", 1e-40),
    ("frequency_penalty", 3),
    ("presence_penalty", -3),
    *[("ignore_eos", value) for value in ("x", 1)],
    ("skip_special_tokens", {}),
    ("stop", 5),
    ("stop", [5]),
    ("stop", ["x"] * 65),
    ("stop", "x" * 1025),
    ("stop", {"a": "b"}),
    ("stop", "\ud800"),
    ("stop_regex", "(a+)+$"),
    ("stop_regex", ["x"] * 9),
    *[
        ("stop_token_ids", value)
        for value in (5, [1000], [-1], ["a"], [2**70], [1] * 1025, {"a": 1})
    ],
    *[("logit_bias", value) for value in ([1], {str(i): 0 for i in range(1025)})],
    *[("logit_bias", {key: 1}) for key in ("a", "1000", "-1", "1" * 5000, 1000, None)],
    *[("logit_bias", {"5": value}) for value in (None, "x", math.nan, 1e7, [1])],
    *[("json_schema", value) for value in (5, {"type": "object"}, "[" * 65)],
    ("json_schema", "x" * (1 << 17)),
    ("json_schema", '"\ud800"'),
    ("structural_tag", {}),
    ("regex", "(" * 65 + ")" * 65),
    ("regex", "[a-z]?" * 65),
    ("ebnf", "root ::= " + "[a-z]? " * 150),
    *[("custom_params", value) for value in (7, "x", [1])],
    ("foo", 1),
    ("x" * 100_000, 1),
    (7, 1),  # type: ignore[list-item]
    *[(name, value) for name in INTERNAL for value in (None, True)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: None)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        check_sampling_params({name: value}, VOCAB)
    message = str(error.value)
    assert str(name)[:40] in message
    assert len(message) < 500
    message.encode()


@pytest.mark.parametrize(
    ("name", "feature", "harmless"),
    [("beam_width", "beam search", 1), ("watermark", "watermarks", None)],
)
def test_refused_by_name(name: str, feature: str, harmless: Any) -> None:
    if name not in SERVED:
        with pytest.raises(ConfigError, match=f"Unknown sampling parameter '{name}'"):
            check_sampling_params({name: harmless}, VOCAB)
        return
    check_sampling_params({name: harmless}, VOCAB)
    for value in (2, 1 << 30) if name == "beam_width" else ({"enabled": True}, "x"):
        with pytest.raises(UnsupportedModeError, match=feature) as error:
            check_sampling_params({name: value}, VOCAB)
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=name):
        check_sampling_params({name: "x" * 1000}, VOCAB)


@pytest.mark.parametrize("params", [None, 7, "x", [{}]])
def test_not_an_object(params: Any) -> None:
    with pytest.raises(ConfigError, match="must be an object"):
        check_sampling_params(params, VOCAB)


def test_unknown_parameter_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        check_sampling_params({"temprature": 1}, VOCAB)


def test_every_parameter_of_sglang_is_decided() -> None:
    """A new one must be looked at before clients may set it."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    assert set(SERVED) | set(INTERNAL) == set(SamplingParams.__struct_fields__)
