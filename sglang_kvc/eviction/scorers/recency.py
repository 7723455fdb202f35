"""The latest entries, beside the sinks that every scorer keeps (StreamingLLM)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer
from sglang_kvc.kernels.positional import recency_scores


@dataclass(frozen=True)
class RecencyScorer(Scorer):
    """Later is higher; all heads keep the same positions under any allocation."""

    observes: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return recency_scores(ctx.arena, ctx.tables, ctx.plan)
