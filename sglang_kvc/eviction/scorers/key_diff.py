"""Keys alone, no query: what differs from the rest of its head stays (KeyDiff)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.eviction.scorers.base import ScoreContext, Scorer
from sglang_kvc.kernels.key_diff import key_diff


@dataclass(frozen=True)
class KeyDiffScorer(Scorer):
    """1 - cosine with the head's mean direction, anew in every pass.

    Not pooled: a neighbour of an unusual key is not unusual for it.
    """

    observes: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def score(self, ctx: ScoreContext) -> torch.Tensor:
        return key_diff(ctx.arena, ctx.tables, ctx.plan)
