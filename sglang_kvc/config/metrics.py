"""What a KV can be worth, by name. Imports neither torch nor SGLang."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A metric of the server's options; `eviction.scorers` has a scorer for each.

    Parameters
    ----------
    name : str
        Value of ``--kv-compress-metric``.
    observes : bool
        Whether it adds up the attention of observed queries.
    power : int, optional
        Exponent of their probabilities, 1 or 2; None if it does not observe.
    value_norms : bool
        Whether a probability is weighed by the length of the value.
    """

    name: str
    observes: bool = False
    power: int | None = None
    value_norms: bool = False


METRICS = {
    metric.name: metric
    for metric in (
        Metric("l2", observes=True, power=2),
        Metric("l1", observes=True, power=1),
        Metric("value_norm", observes=True, power=2, value_norms=True),
        Metric("value_norm_l1", observes=True, power=1, value_norms=True),
        Metric("key_similarity"),
        Metric("recency"),
        Metric("random"),
    )
}
ATTENTION_METRICS = tuple(name for name, metric in METRICS.items() if metric.observes)
