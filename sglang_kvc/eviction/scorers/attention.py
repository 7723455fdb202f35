"""Attention mass: the paper's KVC-w. Its L2 form sums squared probabilities.

Times the length of the value it says what a KV moves the output by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.config.metrics import Metric
from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """Sum of probability ** power over the window's queries and the group's heads.

    Attributes
    ----------
    power : 1 or 2.
    value_norms : whether new mass counts |v| times.
    """

    observes: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    power: int
    value_norms: bool

    @classmethod
    def of(cls, metric: Metric) -> AttentionScorer:
        """The scorer of a metric that observes."""
        assert metric.power is not None, metric.name
        return cls(metric.name, metric.power, metric.value_norms)

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return ctx.attention(self.power, value_norms=self.value_norms)
