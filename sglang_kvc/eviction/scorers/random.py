"""A random choice: what any other scorer must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer
from sglang_kvc.kernels.positional import random_scores


@dataclass(frozen=True)
class RandomScorer(Scorer):
    """Uniform in (0, 1), drawn once for every KV of every head.

    It accumulates in that a stored score is kept and not drawn again.
    """

    observes: ClassVar[bool] = False
    accumulates: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    seed: int = 0

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return random_scores(ctx.arena, ctx.tables, ctx.plan, seed=self.seed)
