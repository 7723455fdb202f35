"""Ways to score KVs, by name. Imports no SGLang."""

from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.scorers.attention import AttentionScorer
from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer
from sglang_kvc.eviction.scorers.key_diff import KeyDiffScorer
from sglang_kvc.eviction.scorers.random import RandomScorer
from sglang_kvc.eviction.scorers.recency import RecencyScorer
from sglang_kvc.eviction.scorers.value_norm import ValueNormScorer

__all__ = ["SCORERS", "ScoreContext", "Scorer", "get_scorer"]

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        AttentionScorer("l2", power=2),
        AttentionScorer("l1", power=1),
        ValueNormScorer("value_norm", power=2),
        ValueNormScorer("value_norm_l1", power=1),
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
