"""Ways to score KVs, by name. Imports no SGLang."""

from sglang_kvc.config.metrics import ATTENTION_METRICS, METRICS
from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.scorers.attention import AttentionScorer
from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer
from sglang_kvc.eviction.scorers.key_diff import KeyDiffScorer
from sglang_kvc.eviction.scorers.random import RandomScorer
from sglang_kvc.eviction.scorers.recency import RecencyScorer

__all__ = ["SCORERS", "ScoreContext", "Scorer", "get_scorer"]

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        *(AttentionScorer.of(METRICS[name]) for name in ATTENTION_METRICS),
        KeyDiffScorer("key_similarity"),
        RecencyScorer("recency"),
        RandomScorer("random"),
    )
}


def get_scorer(name: str) -> Scorer:
    """The scorer of this name.

    Raises
    ------
    ConfigError : there is none; the message lists the names.
    """
    if name not in SCORERS:
        raise ConfigError(f"metric must be one of {', '.join(SCORERS)}, got {name!r}.")
    return SCORERS[name]
