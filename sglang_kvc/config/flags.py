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
    "rate": (
        float,
        "X",
        "Keep 1/X of a request's tokens, per KV head on average; the budget grows with "
        "the answer, and --kv-compress-min-budget bounds it from below. 1 keeps all, "
        "fractions are allowed.",
    ),
    "budget": (
        int,
        "TOKENS",
        "Keep this many tokens per KV head on average, whatever the length of the "
        "request (rounded up to 16). Excludes --kv-compress-rate. Default: by rate.",
    ),
    "min_budget": (
        int,
        "TOKENS",
        "With a rate: never keep fewer tokens than this. It bounds a request's own "
        "rate, too, but no budget; short prompts are kept whole up to it.",
    ),
    "window": (
        int,
        "QUERIES",
        f"Last queries, 1 to {MAX_WINDOW}, whose attention scores the keys. They are "
        "stored for every request slot, 8 MiB at 32 for an 8B model. It is no sliding "
        "window.",
    ),
    "protected": (
        int,
        "TOKENS",
        "Most recent tokens, at each pass, that are never evicted.",
    ),
    "interval": (
        int,
        "TOKENS",
        "Decoded tokens between two passes of a request, which holds up to so many and "
        "32 more than its budget meanwhile.",
    ),
    "sinks": (int, "TOKENS", "First tokens that are never evicted."),
    "pool_back": (
        int,
        "TOKENS",
        "Spread: a token of a prompt shares in the worth of the best of this many "
        f"before it, 0 to {MAX_POOL}: what follows a match is kept with it.",
    ),
    "pool_ahead": (
        int,
        "TOKENS",
        f"Spread: the same for those behind it, 0 to {MAX_POOL}.",
    ),
    "pool_decay": (
        float,
        "X",
        "Spread: what is left of another token's worth with every token of distance: "
        "above 0, at most 1, which is all of it.",
    ),
    "pool_gain": (
        float,
        "X",
        "Spread: what another token's worth counts for at all, beside a token's own: "
        "above 0, at most 1, which is as much.",
    ),
    "metric": (
        str,
        "{" + ",".join(METRICS) + "}",
        "What a KV is worth: squared (l2) or plain (l1) attention probabilities, "
        "either times the value's norm (value_norm, value_norm_l1); how unlike the "
        "head's mean key it is (key_similarity keeps what is dissimilar); recency; or "
        "a random draw.",
    ),
    "distinct": (
        float,
        "X",
        "What a key that is unlike the others of its head adds to the worth of a "
        "prompt's KV, in units of the mean worth: keeps what the question did not look "
        f"at and nothing else stands for. Default: {DISTINCT} if attention is the "
        "metric, else 0 (an error if given).",
    ),
    "allocation": (
        str,
        "{" + ",".join(ALLOCATIONS) + "}",
        "Who competes for a budget: all heads (joint), the heads of a layer (layer), "
        "or nobody: every head keeps the same number (head).",
    ),
    "head_floor": (
        int,
        "TOKENS",
        "Best tokens that every head keeps, whatever the others are worth (rounded up "
        "to 16).",
    ),
    "layer_share": (
        float,
        "X",
        "With joint budgets: the part of an equal share of a prompt that every layer "
        f"keeps at least, 0 to 1. Default: {LAYER_SHARE}, or 0 with other budgets (an "
        "error if given).",
    ),
    "chunks": (
        str,
        "{" + ",".join(CHUNK_MODES) + "}",
        "Serve prompts longer than the KV pool, at a loss of quality, by compressing "
        "them between their chunks: prompts of half the pool or more (auto), all, or "
        "none.",
    ),
    "chunk_queries": (
        str,
        "{" + ",".join(CHUNK_QUERIES) + "}",
        "Whose last queries score a chunk when it is compressed: the whole prompt's, "
        "which run once more behind each chunk, or the chunk's own.",
    ),
}
USER_FLAGS = ("rate", "budget", "min_budget", "chunks")
"""What a user turns, beside the switch; the others are for experts."""
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
    experts = parser.add_argument_group(
        "KV-Compress, expert", "The defaults were tuned together."
    )
    for field, (parse, metavar, text) in _FLAGS.items():
        default = getattr(KVCompressOptions, field)
        target = group if field in USER_FLAGS else experts
        target.add_argument(
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
