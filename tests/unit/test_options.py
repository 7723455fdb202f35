"""Server options: ranges, budgets, command line, keyword arguments."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pickle
from typing import Any

import pytest

from sglang_kvc.config.described import flags_of, help_of
from sglang_kvc.config.flags import add_cli_arguments, options_from_mapping
from sglang_kvc.config.keep import Keep
from sglang_kvc.config.options import (
    DEFAULT_DISTINCT,
    DEFAULT_LAYER_SHARE,
    DEFAULT_RATE,
    KVCompressOptions,
)
from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.errors import ConfigError

COUNTS = (
    *("budget", "min_budget", "window", "protected", "interval", "sinks"),
    *("pool_back", "pool_ahead", "head_floor", "answer", "delay"),
)
FACTORS = ("pool_decay", "pool_gain", "aging", "distinct", "layer_share")
TOO_MANY = (1 << 30) + 1


def parse(*argv: str) -> KVCompressOptions | None:
    """Options from a command line."""
    parser = argparse.ArgumentParser()
    add_cli_arguments(parser)
    values = vars(parser.parse_args(argv))
    options = options_from_mapping(values)
    assert values == {}, "our arguments must not reach SGLang"
    return options


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *[("rate", value) for value in (0.99, 0, -1, math.nan, math.inf, True, "4")],
        *[("rate", value) for value in (1e300, 10**400, (1 << 30) + 1)],
        *[("budget", value) for value in (0, -16, 512.0, True, "512")],
        *[(name, TOO_MANY) for name in COUNTS],
        *[("min_budget", value) for value in (0, 1.5, None)],
        *[("window", value) for value in (0, 257, 32.0)],
        *[("protected", value) for value in (0, -1)],
        *[("interval", value) for value in (0, False)],
        *[("answer", value) for value in (-1, 1.5, None, True)],
        *[("delay", value) for value in (-1, 1.5, None, True, 4097)],
        *[("sinks", value) for value in (-1, 4.0)],
        *[("sessions", value) for value in (1, "true", None)],
        *[("pool_back", value) for value in (-1, 129, 3.5)],
        *[("pool_ahead", value) for value in (-1, 129, True)],
        *[("pool_decay", value) for value in (0, -0.5, 1.01, math.nan, "1", True)],
        *[("metric", value) for value in ("l3", None, "L2")],
        *[("allocation", value) for value in ("heads", None)],
        *[("head_floor", value) for value in (-1, 16.0)],
        *[("distinct", value) for value in (-0.1, math.nan, math.inf, "1", True)],
        *[("layer_share", value) for value in (-0.1, 1.01, math.nan, "1", True)],
        *[("aging", value) for value in (0, -0.5, 1.01, math.nan, "1", None)],
        *[("pool_gain", value) for value in (0, -0.5, 1.01, math.nan, "1", None)],
    ],
)
def test_bad_value_is_named(field: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=field) as error:
        KVCompressOptions(**{field: bad})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", ["rate", *COUNTS, *FACTORS])
def test_no_integer_is_too_large_to_be_refused(name: str) -> None:
    """Python refuses to print this one, or to make it a float."""
    with pytest.raises(ConfigError, match=f"{name} .*about 5001 digits"):
        KVCompressOptions(**{name: 10**5000})


@pytest.mark.parametrize(
    "good",
    [
        {"rate": 1},
        {"rate": 1 << 30},
        {"budget": 1 << 30},
        {"interval": 1 << 30},
        {"window": 256},
        {"pool_back": 0, "pool_ahead": 0},
        {"pool_back": 128, "pool_ahead": 128},
        {"pool_decay": 1},
        {"pool_decay": 1e-9},
        {"pool_gain": 1},
        {"sinks": 0, "protected": 1, "min_budget": 1},
        {"metric": "l1"},
        {"metric": "key_similarity", "allocation": "head"},
        {"head_floor": 512},
        {"layer_share": 1},
        {"distinct": 3},
        {"distinct": 0.5, "metric": "l1"},
        {"distinct": 0, "metric": "recency"},
        {"layer_share": 0, "allocation": "layer"},
        {"budget": 48},
        {"delay": 4096},
        {"delay": 32, "metric": "l2"},
        {"delay": 0, "metric": "random"},
    ],
)
def test_limits_are_legal(good: dict[str, Any]) -> None:
    KVCompressOptions(**good)


@pytest.mark.parametrize("name", ["budget", "min_budget"])
def test_budget_below_forced_survivors_names_the_numbers(name: str) -> None:
    assert KVCompressOptions(sinks=4, protected=100).floor == 112
    with pytest.raises(ConfigError) as error:
        KVCompressOptions(**{"sinks": 4, "protected": 100, name: 96})
    for part in (f"{name}=96", "sinks=4", "protected=100", "112"):
        assert part in str(error.value)


def test_a_budget_holds_the_floor_of_every_head() -> None:
    assert KVCompressOptions(head_floor=100).floor == 112
    with pytest.raises(ConfigError, match="head_floor=513"):
        KVCompressOptions(head_floor=513)


@pytest.mark.parametrize("metric", ["key_similarity", "recency", "random"])
def test_distinct_keys_add_to_attention(metric: str) -> None:
    with pytest.raises(ConfigError, match=f"distinct=1 .*metric={metric}.*value_norm"):
        KVCompressOptions(distinct=1, metric=metric)


def test_what_is_not_attention_does_not_age() -> None:
    with pytest.raises(ConfigError, match="aging=0.5 .*metric=random"):
        KVCompressOptions(aging=0.5, metric="random")
    assert KVCompressOptions(aging=0.5, metric="l1").aging == 0.5


@pytest.mark.parametrize("allocation", ["layer", "head"])
def test_a_share_of_layers_is_for_joint_budgets(allocation: str) -> None:
    with pytest.raises(ConfigError, match=f"layer_share=0.5.*allocation={allocation}"):
        KVCompressOptions(layer_share=0.5, allocation=allocation)


def test_what_depends_on_others_is_on_where_it_can_be() -> None:
    def resolved(**given: Any) -> tuple[float, float]:
        options = KVCompressOptions(**given)
        return options.distinct_weight, options.least_layer_share

    assert resolved() == (DEFAULT_DISTINCT, DEFAULT_LAYER_SHARE)
    assert DEFAULT_DISTINCT > 0
    assert 0 < DEFAULT_LAYER_SHARE < 1
    assert resolved(metric="recency") == (0, DEFAULT_LAYER_SHARE)
    assert resolved(allocation="head") == (DEFAULT_DISTINCT, 0)
    assert resolved(distinct=0, layer_share=0) == (0, 0)
    changed = dataclasses.replace(KVCompressOptions(), rate=8)
    assert changed == KVCompressOptions(rate=8)
    argv = "--kv-compress --kv-compress-allocation head --kv-compress-metric random"
    assert parse(*argv.split()) == KVCompressOptions(metric="random", allocation="head")


def test_rate_and_budget_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        KVCompressOptions(rate=8, budget=1024)
    with pytest.raises(ConfigError, match="exclude each other"):
        KVCompressOptions(rate=4, budget=1024)
    assert KVCompressOptions(budget=1024).keep == Keep(budget=1024)
    assert KVCompressOptions().keep == Keep(rate=DEFAULT_RATE)


@pytest.mark.parametrize(
    ("options", "length", "expected"),
    [
        ({}, 4096, 1024),
        ({}, 4097, 1040),
        ({}, 100, 512),
        ({"rate": 1}, 1000, 1008),
        ({"rate": 3, "min_budget": 48}, 100, 48),
        ({"budget": 1000}, 10, 1008),
        ({"budget": 1000}, 100_000, 1008),
        ({"min_budget": 500}, 0, 512),
    ],
)
def test_budget_tokens(options: dict[str, Any], length: int, expected: int) -> None:
    kept = KVCompressOptions(**options).budget_tokens(length)
    assert kept == expected
    assert kept % PAGE_SIZE == 0


def test_request_overrides_the_server() -> None:
    by_budget = KVCompressOptions(budget=1024)
    assert by_budget.budget_tokens(65536, Keep(rate=64)) == 1024
    assert by_budget.budget_tokens(65536, Keep(rate=16)) == 4096
    assert KVCompressOptions().budget_tokens(65536, Keep(budget=2000)) == 2000


def test_options_are_frozen_and_travel_by_pickle() -> None:
    options = KVCompressOptions(rate=8)
    assert pickle.loads(pickle.dumps(options)) == options
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.rate = 2.0  # type: ignore[misc]


def test_command_line() -> None:
    assert parse() is None
    assert parse("--kv-compress") == KVCompressOptions()
    argv = "--kv-compress --kv-compress-budget 2048 --kv-compress-min-budget 64"
    argv += " --kv-compress-window 8 --kv-compress-protected 16"
    argv += " --kv-compress-interval 128 --kv-compress-sinks 0"
    argv += " --kv-compress-pool-back 48 --kv-compress-pool-ahead 1"
    argv += " --kv-compress-pool-decay 0.5 --kv-compress-pool-gain 0.25"
    argv += " --kv-compress-metric l1 --kv-compress-allocation layer"
    argv += " --kv-compress-head-floor 32"
    assert parse(*argv.split()) == KVCompressOptions(
        budget=2048,
        min_budget=64,
        window=8,
        protected=16,
        interval=128,
        sinks=0,
        pool_back=48,
        pool_ahead=1,
        pool_decay=0.5,
        pool_gain=0.25,
        metric="l1",
        allocation="layer",
        head_floor=32,
    )


def test_setting_without_the_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_compress_rate.*Add --kv-compress"):
        parse("--kv-compress-rate", "8")


@pytest.mark.parametrize("rate", ["4", "4.0", "8"])
def test_rate_and_budget_on_the_command_line(rate: str) -> None:
    """Also when the rate given is the default."""
    with pytest.raises(ConfigError, match="exclude each other"):
        parse("--kv-compress", "--kv-compress-rate", rate, "--kv-compress-budget", "64")


def test_help_states_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(KVCompressOptions):
        assert f"--kv-compress-{field.name.replace('_', '-')}" in text
        if field.default is not None and field.default is not False:
            assert f"Default: {field.default}." in text


def test_a_field_is_described_once() -> None:
    text = " ".join((KVCompressOptions.__doc__ or "").split())
    for field in dataclasses.fields(KVCompressOptions):
        assert f"{field.name} : {field.type} " in text
        assert " ".join(help_of(KVCompressOptions, field.name).split()) in text
    flags = flags_of(KVCompressOptions)
    assert flags["chunks"].placeholder == "{auto,always,never}"
    assert flags["rate"].placeholder == "X"
    users = [name for name, flag in flags.items() if not flag.expert]
    assert users == [
        *("rate", "budget", "min_budget", "answer", "delay", "chunks"),
        *("sessions", "sessions_host"),
    ]


def test_keywords_are_taken_out() -> None:
    values = {"model_path": "m", "kv_compress": True, "kv_compress_rate": 8}
    assert options_from_mapping(values) == KVCompressOptions(rate=8)
    assert values == {"model_path": "m"}


@pytest.mark.parametrize("values", [{}, {"kv_compress": False}, {"kv_compress": None}])
def test_off(values: dict[str, Any]) -> None:
    assert options_from_mapping(values) is None


def test_unknown_keyword_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="Did you mean kv_compress_budget") as error:
        options_from_mapping({"kv_compress": True, "kv_compress_bugdet": 1})
    assert "kv_compress_min_budget" in str(error.value)
    with pytest.raises(ConfigError, match="Unknown keyword kv_compressed"):
        options_from_mapping({"kv_compressed": True})


def test_switch_is_a_bool() -> None:
    with pytest.raises(ConfigError, match="kv_compress must be True or False"):
        options_from_mapping({"kv_compress": 8})


def test_sessions_are_a_switch() -> None:
    """On the command line without a value; off unless given."""
    kept = parse("--kv-compress", "--kv-compress-sessions")
    assert kept is not None
    assert kept.sessions
    other = parse("--kv-compress")
    assert other is not None
    assert not other.sessions
    assert options_from_mapping({"kv_compress": True, "kv_compress_sessions": True})
    with pytest.raises(ConfigError, match="KV-Compress is off"):
        parse("--kv-compress-sessions")
