"""Flags and keyword arguments of KV-Compress, parsed into `KVCompressOptions`.

Like `options`, this module imports neither torch nor SGLang.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, MutableMapping
from typing import Any

from sglang_kvc.config.options import (
    ALLOCATIONS,
    CHOICES,
    CHUNK_MODES,
    CHUNK_QUERIES,
    DISTINCT,
    LAYER_SHARE,
    MAX_POOL,
    MAX_WINDOW,
    METRICS,
    SWITCH,
    KVCompressOptions,
)
from sglang_kvc.errors import ConfigError

_FLAGS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "rate": (float, "X", "Keep 1/X of a request's tokens, per KV head on average."),
    "budget": (
        int,
        "TOKENS",
        "Keep this many tokens per KV head on average, whatever the length of the "
        "request (rounded up to 16). Excludes --kv-compress-rate. Default: by rate.",
    ),
    "min_budget": (int, "TOKENS", "With a rate: never keep fewer tokens than this."),
    "window": (
        int,
        "QUERIES",
        f"Last queries, 1 to {MAX_WINDOW}, whose attention scores the keys.",
    ),
    "protected": (int, "TOKENS", "Most recent tokens that are never evicted."),
    "interval": (int, "TOKENS", "Decoded tokens between two passes of a request."),
    "sinks": (int, "TOKENS", "First tokens that are never evicted."),
    "pool_back": (
        int,
        "TOKENS",
        "A token of a prompt shares in the worth of the best of this many before it, "
        f"0 to {MAX_POOL}: what follows a match is kept with it.",
    ),
    "pool_ahead": (int, "TOKENS", f"The same for those behind it, 0 to {MAX_POOL}."),
    "pool_decay": (
        float,
        "X",
        "What is left of another token's worth with every token of distance: above 0, "
        "at most 1, which is all of it.",
    ),
    "pool_gain": (
        float,
        "X",
        "What another token's worth counts for at all, beside a token's own: above 0, "
        "at most 1, which is as much.",
    ),
    "metric": (
        str,
        "{" + ",".join(METRICS) + "}",
        "What a KV is worth: squared (l2) or plain (l1) attention probabilities, "
        "either times the value's norm (value_norm, value_norm_l1), the key's distance "
        "from the others, recency, or a random draw.",
    ),
    "distinct": (
        float,
        "X",
        "What a key that is unlike the others of its head adds to the worth of a "
        "prompt's KV, in units of the mean worth: keeps what the question did not look "
        f"at and nothing else stands for. Default: {DISTINCT} if attention is the "
        "metric.",
    ),
    "allocation": (
        str,
        "{" + ",".join(ALLOCATIONS) + "}",
        "Who shares a budget: all heads of all layers (joint), the heads of a layer, "
        "or nobody (head: as much for every head).",
    ),
    "head_floor": (int, "TOKENS", "Tokens that every head keeps (rounded up to 16)."),
    "layer_share": (
        float,
        "X",
        "With joint budgets: the part of an equal share of a prompt that every layer "
        f"keeps at least, 0 to 1. Default: {LAYER_SHARE}.",
    ),
    "chunks": (
        str,
        "{" + ",".join(CHUNK_MODES) + "}",
        "Compress a prompt between its chunks, so that it never has to fit in the "
        "pool: for prompts of half the pool or more (auto), always or never.",
    ),
    "chunk_queries": (
        str,
        "{" + ",".join(CHUNK_QUERIES) + "}",
        "Whose last queries score a chunk when it is compressed: the whole prompt's, "
        "which run once more behind each chunk, or the chunk's own.",
    ),
}
assert list(_FLAGS) == [field.name for field in dataclasses.fields(KVCompressOptions)]


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--kv-compress*`` flags to SGLang's parser.

    Values default to None so that "not given" and "given as the default" differ.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Modified in place.
    """
    group = parser.add_argument_group(
        "KV-Compress", "Evict the KV cache at its own rate per layer and KV head."
    )
    group.add_argument(
        "--kv-compress",
        action="store_true",
        default=False,
        help="Compress the KV cache of every request.",
    )
    for field, (parse, metavar, text) in _FLAGS.items():
        default = getattr(KVCompressOptions, field)
        group.add_argument(
            f"--kv-compress-{field.replace('_', '-')}",
            type=parse,
            metavar=metavar,
            choices=CHOICES.get(field),
            help=text if default is None else f"{text} Default: {default}.",
        )


def options_from_mapping(values: MutableMapping[str, Any]) -> KVCompressOptions | None:
    """Take the ``kv_compress*`` entries out of a mapping.

    Parameters
    ----------
    values : MutableMapping
        Keyword arguments of ``Engine`` or ``vars(Namespace)``; our entries are
        removed. An entry of None counts as not given.

    Returns
    -------
    KVCompressOptions or None
        None if the feature is off.

    Raises
    ------
    ConfigError
        For an unknown ``kv_compress*`` key, a setting without the switch, a rate
        together with a budget, or a value outside its range.
    """
    given = {key: values.pop(key) for key in list(values) if key.startswith(SWITCH)}
    keys = {f"{SWITCH}_{field}": field for field in _FLAGS}
    for key in given:
        if key != SWITCH and key not in keys:
            raise ConfigError(_unknown_key(key, [SWITCH, *keys]))
    switch = given.pop(SWITCH, None)
    fields = {keys[key]: value for key, value in given.items() if value is not None}
    if switch not in (None, True, False):
        raise ConfigError(
            f"{SWITCH} must be True or False, got {switch!r}. Settings have their own "
            f"keywords, for example {SWITCH}_rate=8."
        )
    if not switch:
        if fields:
            names = ", ".join(f"{SWITCH}_{name}" for name in fields)
            raise ConfigError(
                f"{names} given, but KV-Compress is off. Add --kv-compress "
                f"({SWITCH}=True in Python), or drop the setting."
            )
        return None
    if "rate" in fields and "budget" in fields:
        raise ConfigError(
            f"--kv-compress-rate {fields['rate']} and --kv-compress-budget "
            f"{fields['budget']} exclude each other; give one of them."
        )
    return KVCompressOptions(**fields)


def _unknown_key(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"Unknown keyword {key}.{hint} Valid: {', '.join(valid)}."
