"""Attention mass: the paper's KVC-w. Its L2 form sums squared probabilities."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer


@dataclass(frozen=True)
class AttentionScorer(Scorer):
    """Sum of probability ** power over the window's queries and the group's heads."""

    observes: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    power: int = 2

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return ctx.attention(self.power)
