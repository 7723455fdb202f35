"""Attention mass times the length of the value: what a KV moves the output by."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer


@dataclass(frozen=True)
class ValueNormScorer(Scorer):
    """Like `AttentionScorer`, but new mass counts |v| times."""

    observes: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    pooled: ClassVar[bool] = True
    power: int

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return ctx.attention(self.power, value_norms=True)
