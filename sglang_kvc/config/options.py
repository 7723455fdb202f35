"""Options of KV-Compress: one frozen record, validated when it is made.

The record is attached to SGLang's ``ServerArgs`` and pickled into the scheduler
processes, so this module imports neither torch nor SGLang.

Units: *tokens* are tokens kept per KV head, averaged over all heads of all layers.
A page holds :data:`PAGE_SIZE` tokens; budgets are whole pages.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sglang_kvc.config.checks import check_int
from sglang_kvc.config.described import (
    choice,
    documented,
    integer,
    number,
    switch,
)
from sglang_kvc.config.keep import Keep
from sglang_kvc.config.metrics import METRICS
from sglang_kvc.config.option_checks import (
    MAX_DELAY,
    MAX_POOL,
    MAX_WINDOW,
    check_options,
)
from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens
from sglang_kvc.errors import ConfigError

ALLOCATIONS = ("joint", "layer", "head")
CHUNK_MODES = ("auto", "always", "never")
CHUNK_QUERIES = ("prompt", "chunk")
DEFAULT_RATE = 4.0
DEFAULT_DISTINCT = 0.1
"""With attention as the metric."""
DEFAULT_LAYER_SHARE = 0.5
"""With joint budgets."""
BACKEND = "kvcompress"
"""Name under which the attention backend and the radix cache are registered."""

SWITCH = "kv_compress"
"""Name of the on/off keyword; every other one starts with it."""


@documented
@dataclass(frozen=True)
class KVCompressOptions:
    """Server-wide settings. None stands for the default that the help text states.

    See also `kernels.pool` (spread), `eviction.scorers` (metric), `kernels.novelty`,
    `scheduling.chunking` (chunks) and `attention.probe` (chunk_queries).

    Raises
    ------
    ConfigError
        If a value is outside its range or two values contradict each other.
    """

    rate: float | None = number(
        None,
        "Keep 1/X of a request's tokens, per KV head on average; the budget grows with "
        "the answer, and --kv-compress-min-budget bounds it from below. 1 keeps all, "
        f"fractions are allowed. Default: {DEFAULT_RATE}.",
        expert=False,
    )
    budget: int | None = integer(
        None,
        "TOKENS",
        "Keep this many tokens per KV head on average, whatever the length of the "
        "request (rounded up to 16). Excludes --kv-compress-rate. Default: by rate.",
        expert=False,
    )
    min_budget: int = integer(
        512,
        "TOKENS",
        "With a rate: never keep fewer tokens than this. It bounds a request's own "
        "rate, too, but no budget; short prompts are kept whole up to it.",
        expert=False,
    )
    answer: int = integer(
        0,
        "TOKENS",
        "Last tokens of an answer (rounded up to 16) that stay whole, beside the "
        "budget, which is then that of all before them. 0: decoded tokens compete "
        "with the prompt, and count against its rate or budget.",
        expert=False,
    )
    delay: int = integer(
        0,
        "TOKENS",
        "Decoded tokens that the first pass of a request waits for, 0 to "
        f"{MAX_DELAY}, so that queries of the answer choose what is kept. The prompt "
        "stays whole until then. Nothing waits that has no room for it, or that may "
        "end before. With attention as the metric only.",
        expert=False,
    )
    window: int = integer(
        32,
        "QUERIES",
        f"Last queries, 1 to {MAX_WINDOW}, whose attention scores the keys. They are "
        "stored for every request slot, 8 MiB at 32 for an 8B model. It is no sliding "
        "window.",
    )
    protected: int = integer(
        32, "TOKENS", "Most recent tokens, at each pass, that are never evicted."
    )
    interval: int = integer(
        64,
        "TOKENS",
        "Decoded tokens between two passes of a request, which holds up to so many and "
        "32 more than its budget meanwhile.",
    )
    sinks: int = integer(4, "TOKENS", "First tokens that are never evicted.")
    pool_back: int = integer(
        64,
        "TOKENS",
        "Spread: a token of a prompt shares in the worth of the best of this many "
        f"before it, 0 to {MAX_POOL}: what follows a match is kept with it.",
    )
    pool_ahead: int = integer(
        3, "TOKENS", f"Spread: the same for those behind it, 0 to {MAX_POOL}."
    )
    pool_decay: float = number(
        0.95,
        "Spread: what is left of another token's worth with every token of distance: "
        "above 0, at most 1, which is all of it.",
    )
    pool_gain: float = number(
        0.03,
        "Spread: what another token's worth counts for at all, beside a token's own: "
        "above 0, at most 1, which is as much.",
    )
    metric: str = choice(
        "value_norm",
        tuple(METRICS),
        "What a KV is worth: squared (l2) or plain (l1) attention probabilities, "
        "either times the value's norm (value_norm, value_norm_l1); how unlike the "
        "head's mean key it is (key_similarity keeps what is dissimilar); recency; or "
        "a random draw.",
    )
    aging: float = number(
        1.0,
        "What is left at each later pass of what a KV was worth before: above 0, at "
        "most 1, which is all of it. Less favours what the answer looks at now. With "
        "attention as the metric only.",
    )
    distinct: float | None = number(
        None,
        "What a key that is unlike the others of its head adds to the worth of a "
        "prompt's KV, in units of the mean worth: keeps what the question did not look "
        "at and nothing else stands for. "
        f"Default: {DEFAULT_DISTINCT} if attention is the metric, else 0 (an error if "
        "given).",
    )
    allocation: str = choice(
        "joint",
        ALLOCATIONS,
        "Who competes for a budget: all heads (joint), the heads of a layer (layer), "
        "or nobody: every head keeps the same number (head).",
    )
    head_floor: int = integer(
        0,
        "TOKENS",
        "Best tokens that every head keeps, whatever the others are worth (rounded up "
        "to 16).",
    )
    # 1 is allocation="layer". Above 0, what is decoded later takes the place of
    # something in its own layer.
    layer_share: float | None = number(
        None,
        "With joint budgets: the part of an equal share of a prompt that every layer "
        "keeps at least, 0 to 1. "
        f"Default: {DEFAULT_LAYER_SHARE}, or 0 with other budgets (an error if given).",
    )
    chunks: str = choice(
        "auto",
        CHUNK_MODES,
        "Serve prompts longer than the KV pool, at a loss of quality, by compressing "
        "them between their chunks: prompts of half the pool or more (auto), all, or "
        "none.",
        expert=False,
    )
    sessions: bool = switch(
        "Keep what a compressed request leaves, packed, and let the next turn of its "
        "conversation start from it. Such a hit is lossy, unlike the prefix cache's.",
        expert=False,
    )
    sessions_host: float = number(
        0.0,
        "With sessions: host memory for what the pool has no room for, as a multiple "
        "of the KV pool. It is copied back when its conversation goes on.",
        expert=False,
    )
    chunk_queries: str = choice(
        "prompt",
        CHUNK_QUERIES,
        "Whose last queries score a chunk when it is compressed: the whole prompt's, "
        "which run once more behind each chunk, or the chunk's own.",
    )
    turns: int = integer(
        2,
        "STEPS",
        "Decode steps between two prefills while fewer prompts wait than requests run, "
        "so that prompts do not hold up the answers of others. A prefill then takes at "
        "most 1,024 new tokens, or a chunk of a prompt that is compressed between "
        "chunks. 0: prompts go first, as in SGLang.",
    )

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def distinct_weight(self) -> float:
        """What distinct keys add: as given, else what suits the metric."""
        if self.distinct is not None:
            return self.distinct
        return DEFAULT_DISTINCT if METRICS[self.metric].observes else 0.0

    @property
    def least_layer_share(self) -> float:
        """What every layer keeps at least: as given, else what suits the allocation."""
        if self.layer_share is not None:
            return self.layer_share
        return DEFAULT_LAYER_SHARE if self.allocation == "joint" else 0.0

    @cached_property
    def keep(self) -> Keep:
        """What a request keeps that does not say it itself."""
        if self.rate is None and self.budget is None:
            return Keep(rate=DEFAULT_RATE)
        return Keep(self.rate, self.budget)

    @property
    def floor(self) -> int:
        """Smallest legal budget in tokens: what no head may lose, whole pages."""
        return ceil_tokens(max(self.sinks + self.protected, self.head_floor))

    @property
    def chunk_allocation(self) -> str:
        """Who shares a budget while a prompt is compressed between its chunks.

        What follows is computed from what was kept, in every layer, so each layer
        keeps its share until the prompt is complete.
        """
        return "layer" if self.allocation == "joint" else self.allocation

    def in_force(self) -> dict[str, Any]:
        """All options by name, with the values that stand for None."""
        keep = self.keep
        return {
            **dataclasses.asdict(self),
            "rate": keep.rate,
            "budget": keep.budget,
            "distinct": self.distinct_weight,
            "layer_share": self.least_layer_share,
        }

    def check_budget(self, name: str, tokens: Any) -> None:
        """Raise unless `tokens` is a budget that holds all forced survivors.

        Raises
        ------
        ConfigError
            Naming the numbers that make up :attr:`floor`.
        """
        check_int(name, tokens, 1)
        if ceil_tokens(tokens) < self.floor:
            raise ConfigError(
                f"{name}={tokens} is too small: sinks={self.sinks} and "
                f"protected={self.protected} tokens are never evicted and every head "
                f"keeps head_floor={self.head_floor}, so a budget needs at least "
                f"{self.floor} tokens ({PAGE_SIZE}-token pages). Raise {name}, or "
                "lower sinks, protected or head_floor."
            )

    def budget_tokens(self, logical_len: int, keep: Keep | None = None) -> int:
        """Tokens a request of this length may keep, per KV head on average.

        Parameters
        ----------
        logical_len : int
            Tokens the request has seen (prompt and output).
        keep : Keep, optional
            What the request asked for; takes the place of the server's setting.

        Returns
        -------
        int
            Whole pages, see `Keep.tokens`.
        """
        return (keep or self.keep).tokens(logical_len, self.min_budget)
