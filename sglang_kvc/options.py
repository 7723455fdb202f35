"""Options of KV-Compress: one frozen record, parsed and validated once.

The record is attached to SGLang's ``ServerArgs`` and pickled into the scheduler
processes, so this module imports neither torch nor SGLang.

Units: *tokens* are tokens kept per KV head, averaged over all heads of all layers.
A page holds :data:`PAGE_SIZE` tokens; budgets are whole pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from sglang_kvc.errors import ConfigError

PAGE_SIZE = 16
METRICS = ("l2", "l1")
CHUNK_MODES = ("auto", "always", "never")
MAX_WINDOW = 256
MAX_POOL = 63

_CHOICES = {"metric": METRICS, "chunks": CHUNK_MODES}

BACKEND = "kvcompress"
"""Name under which the attention backend and the radix cache are registered."""

SWITCH = "kv_compress"
"""Name of the on/off keyword; every other one starts with it."""


def ceil_to_page(tokens: int) -> int:
    """Round a number of tokens up to whole pages, at least one page.

    Parameters
    ----------
    tokens : int
        Tokens, at least 0.

    Returns
    -------
    int
        The smallest multiple of :data:`PAGE_SIZE` that is >= `tokens` and > 0.
    """
    return max(1, -(-tokens // PAGE_SIZE)) * PAGE_SIZE


def check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless `value` is an int (not a bool) within ``[low, high]``.

    Raises
    ------
    ConfigError
        With the name, the rule and the value found.
    """
    rule = f">= {low}" if high is None else f"in {low}..{high}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer {rule}, got {value!r}.")
    if value < low or (high is not None and value > high):
        raise ConfigError(f"{name} must be {rule}, got {value}.")


def check_rate(name: str, value: Any) -> None:
    """Raise unless `value` is a finite real number >= 1.

    Raises
    ------
    ConfigError
        With the name, the rule and the value found.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{name} must be a number >= 1, got {value!r}.")
    if not 1 <= value < math.inf:
        raise ConfigError(
            f"{name} must be a finite number >= 1 (8 keeps one token in eight), "
            f"got {value}."
        )


@dataclass(frozen=True)
class KVCompressOptions:
    """Server-wide settings.

    Parameters
    ----------
    rate : float
        Compression rate: ``logical length / tokens kept``; 1 keeps everything.
    budget : int, optional
        Tokens kept whatever the length. Replaces `rate`; rounded up to whole pages.
    min_budget : int
        With `rate`: never keep fewer tokens than this.
    window : int
        Queries whose attention scores the keys.
    protected : int
        Most recent tokens of every head that are never evicted.
    interval : int
        Decoded tokens between two eviction passes of a request.
    sinks : int
        First tokens of the prompt that are never evicted.
    pool : int
        Width of the max-pooling over key positions, odd; 1 switches it off.
    metric : {"l2", "l1"}
        Sum of squared or of plain attention probabilities.
    chunks : {"auto", "always", "never"}
        Whether a long prompt is compressed between its chunks, see `chunking`.

    Raises
    ------
    ConfigError
        If a value is outside its range or two values contradict each other.
    """

    rate: float = 4.0
    budget: int | None = None
    min_budget: int = 512
    window: int = 32
    protected: int = 32
    interval: int = 64
    sinks: int = 4
    pool: int = 7
    metric: str = "l2"
    chunks: str = "auto"

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        check_int("window", self.window, 1, MAX_WINDOW)
        check_int("protected", self.protected, 1)
        check_int("interval", self.interval, 1)
        check_int("sinks", self.sinks, 0)
        check_int("pool", self.pool, 1, MAX_POOL)
        if self.pool % 2 == 0:
            raise ConfigError(f"pool must be odd, got {self.pool}.")
        for name, valid in _CHOICES.items():
            if getattr(self, name) not in valid:
                raise ConfigError(
                    f"{name} must be one of {', '.join(valid)}, "
                    f"got {getattr(self, name)!r}."
                )
        self.check_budget("min_budget", self.min_budget)
        if self.budget is not None:
            self.check_budget("budget", self.budget)
            if self.rate != KVCompressOptions.rate:
                raise ConfigError(
                    f"rate={self.rate} and budget={self.budget} exclude each other; "
                    "give one of them."
                )

    @property
    def floor(self) -> int:
        """Smallest legal budget in tokens: sinks and protected tokens, whole pages."""
        return ceil_to_page(self.sinks + self.protected)

    def check_budget(self, name: str, tokens: Any) -> None:
        """Raise unless `tokens` is a budget that holds all forced survivors.

        Raises
        ------
        ConfigError
            Naming the numbers that make up :attr:`floor`.
        """
        check_int(name, tokens, 1)
        if ceil_to_page(tokens) < self.floor:
            raise ConfigError(
                f"{name}={tokens} is too small: sinks={self.sinks} and "
                f"protected={self.protected} tokens are never evicted, so a budget "
                f"needs at least {self.floor} tokens ({PAGE_SIZE}-token pages). "
                f"Raise {name}, or lower sinks or protected."
            )

    def budget_tokens(
        self, logical_len: int, rate: float | None = None, budget: int | None = None
    ) -> int:
        """Tokens a request of this length may keep, per KV head on average.

        Parameters
        ----------
        logical_len : int
            Tokens the request has seen (prompt and output).
        rate, budget : optional
            Override the server's setting for one request; at most one of them.

        Returns
        -------
        int
            A multiple of :data:`PAGE_SIZE`. It may exceed `logical_len`, which
            means that nothing has to be evicted.

        Raises
        ------
        ConfigError
            If both overrides are given.
        """
        if rate is not None and budget is not None:
            raise ConfigError(
                f"rate={rate} and budget={budget} exclude each other; give one of them."
            )
        if budget is None and rate is None:
            rate, budget = self.rate, self.budget
        if budget is not None:
            return ceil_to_page(budget)
        assert rate is not None
        kept = ceil_to_page(math.ceil(logical_len / rate))
        return max(ceil_to_page(self.min_budget), kept)


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
    "pool": (
        int,
        "WIDTH",
        f"Max-pooling width over key positions, odd, 1 to {MAX_POOL}; 1 is off.",
    ),
    "metric": (
        str,
        "{" + ",".join(METRICS) + "}",
        "Score of a key: sum of squared (l2) or plain (l1) attention probabilities.",
    ),
    "chunks": (
        str,
        "{" + ",".join(CHUNK_MODES) + "}",
        "Compress a prompt between its chunks, so that it never has to fit in the "
        "pool: for prompts of half the pool or more (auto), always or never.",
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
            choices=_CHOICES.get(field),
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
