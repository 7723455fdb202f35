"""Options of KV-Compress: one frozen record, validated when it is made.

The record is attached to SGLang's ``ServerArgs`` and pickled into the scheduler
processes, so this module imports neither torch nor SGLang.

Units: *tokens* are tokens kept per KV head, averaged over all heads of all layers.
A page holds :data:`PAGE_SIZE` tokens; budgets are whole pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.checks import check_int, check_number, check_rate
from sglang_kvc.config.shown import shown
from sglang_kvc.errors import ConfigError

PAGE_SIZE = 16
ATTENTION_METRICS = ("l2", "l1", "value_norm", "value_norm_l1")
METRICS = (*ATTENTION_METRICS, "key_similarity", "recency", "random")
ALLOCATIONS = ("joint", "layer", "head")
CHUNK_MODES = ("auto", "always", "never")
CHUNK_QUERIES = ("prompt", "chunk")
DISTINCT, LAYER_SHARE = 0.1, 0.5
"""Where they can be used: with attention as the metric, with joint budgets."""
MAX_WINDOW = 256
MAX_POOL = 128

CHOICES = {
    "metric": METRICS,
    "allocation": ALLOCATIONS,
    "chunks": CHUNK_MODES,
    "chunk_queries": CHUNK_QUERIES,
}

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
    pool_back, pool_ahead : int
        A KV of a prompt takes the highest score of those up to `pool_back` positions
        before it and `pool_ahead` behind it, see `kernels.pool`; 0 and 0: its own.
    pool_decay : float
        What is left of such a score with every position of distance, in (0, 1]; 1: all
        of it.
    pool_gain : float
        What such a score counts for at all, in (0, 1]; 1: as much as a KV's own.
    metric : str
        What a KV is worth, one of `METRICS`: the sum of squared (l2) or of plain (l1)
        attention probabilities; squared (value_norm) or plain ones (value_norm_l1)
        times the norm of the value; how far the key is from the head's mean key;
        recency; a random draw. See `scorers`.
    distinct : float
        What a key that is unlike the others of its head adds to the worth of a prompt's
        KV, as a multiple of the request's mean worth, for a key of mean unlikeness; see
        `kernels.distinct`. Only with attention as the metric. None: `DISTINCT`, or 0
        with other metrics.
    allocation : {"joint", "layer", "head"}
        Who shares a budget: all heads of all layers, the heads of a layer, or nobody.
    head_floor : int
        Tokens that every head keeps whatever the others are worth.
    layer_share : float
        With joint budgets: the part of an equal share of a prompt that every layer
        keeps at least, 0 to 1, which is ``allocation="layer"``. Above 0, what is
        decoded later takes the place of something in its own layer. None:
        `LAYER_SHARE`, or 0 with other budgets.
    chunks : {"auto", "always", "never"}
        Whether a long prompt is compressed between its chunks, see `chunking`.
    chunk_queries : {"prompt", "chunk"}
        Whose last queries score what a chunk has brought: those of the whole prompt,
        see `probe`, or of the chunk.

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
    pool_back: int = 64
    pool_ahead: int = 3
    pool_decay: float = 0.95
    pool_gain: float = 0.03
    metric: str = "value_norm"
    distinct: float = None  # type: ignore[assignment]  # a number once it is made
    allocation: str = "joint"
    head_floor: int = 0
    layer_share: float = None  # type: ignore[assignment]  # likewise
    chunks: str = "auto"
    chunk_queries: str = "prompt"

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        check_int("window", self.window, 1, MAX_WINDOW)
        check_int("protected", self.protected, 1)
        check_int("interval", self.interval, 1)
        check_int("sinks", self.sinks, 0)
        check_int("pool_back", self.pool_back, 0, MAX_POOL)
        check_int("pool_ahead", self.pool_ahead, 0, MAX_POOL)
        check_number("pool_decay", self.pool_decay, 0, 1, above=True)
        check_number("pool_gain", self.pool_gain, 0, 1, above=True)
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ConfigError(
                    f"{name} must be one of {', '.join(valid)}, "
                    f"got {shown(getattr(self, name))}."
                )
        self._resolve("distinct", DISTINCT, self.metric in ATTENTION_METRICS)
        self._resolve("layer_share", LAYER_SHARE, self.allocation == "joint")
        check_number("distinct", self.distinct, 0)
        if self.distinct and self.metric not in ATTENTION_METRICS:
            raise ConfigError(
                f"distinct={self.distinct} adds to what attention says; "
                f"metric={self.metric} does not ask it. Leave one of them out, or use "
                f"one of {', '.join(ATTENTION_METRICS)}."
            )
        check_int("head_floor", self.head_floor, 0)
        check_number("layer_share", self.layer_share, 0, 1)
        if self.layer_share and self.allocation != "joint":
            raise ConfigError(
                f"layer_share={self.layer_share} bounds what joint budgets take from a "
                f"layer; with allocation={self.allocation} there is nothing to bound. "
                "Leave one of them out."
            )
        self.check_budget("min_budget", self.min_budget)
        if self.budget is not None:
            self.check_budget("budget", self.budget)
            if self.rate != KVCompressOptions.rate:
                raise ConfigError(
                    f"rate={self.rate} and budget={self.budget} exclude each other; "
                    "give one of them."
                )

    def _resolve(self, name: str, default: float, usable: bool) -> None:
        """Give a setting that depends on others its value if it has none."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, default if usable else 0.0)

    @property
    def floor(self) -> int:
        """Smallest legal budget in tokens: what no head may lose, whole pages."""
        return ceil_to_page(max(self.sinks + self.protected, self.head_floor))

    @property
    def chunk_allocation(self) -> str:
        """Who shares a budget while a prompt is compressed between its chunks.

        What follows is computed from what was kept, in every layer, so each layer
        keeps its share until the prompt is complete.
        """
        return "layer" if self.allocation == "joint" else self.allocation

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
                f"protected={self.protected} tokens are never evicted and every head "
                f"keeps head_floor={self.head_floor}, so a budget needs at least "
                f"{self.floor} tokens ({PAGE_SIZE}-token pages). Raise {name}, or "
                "lower sinks, protected or head_floor."
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
