"""What a scorer is: from the resident KVs of the requests of a pass to their scores.

A pass scores, pools, selects, packs and commits. Only the first two depend on the
scorer: selection wants fp32 scores that are finite and >= 0, higher ones stay. The
scores of survivors are stored in the arena. A scorer that accumulates adds to stored
scores; one that does not may overwrite them. How a scorer is added is in CONTRIBUTING.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from sglang_kvc.kernels.layout import Arena, BlockTables, PassPlan
from sglang_kvc.kernels.observe import observe_scores
from sglang_kvc.kernels.query_ring import QueryRing


@dataclass(frozen=True)
class ScoreContext:
    """What a scorer may look at in one pass.

    Attributes
    ----------
    query_ring, arena, tables, plan : as in `kernels.layout`; only read.
    group : query heads of a KV head.
    sm_scale : factor on the logits.
    """

    query_ring: QueryRing
    arena: Arena
    tables: BlockTables
    plan: PassPlan
    group: int
    sm_scale: float

    def attention(self, power: int, *, value_norms: bool = False) -> torch.Tensor:
        """Attention mass of the observed queries, [plan.num_entries] fp32.

        It is added to what earlier passes have stored.

        Parameters
        ----------
        power : 1 or 2, on the probabilities.
        value_norms : weigh new mass by the length of the value.

        Raises
        ------
        ValueError : `power` is not 1 or 2.
        """
        return observe_scores(
            self.arena,
            self.tables,
            self.plan,
            self.query_ring,
            group=self.group,
            sm_scale=self.sm_scale,
            power=power,
            value_norms=value_norms,
        )


@dataclass(frozen=True)
class Scorer(ABC):
    """A way to score KVs; instances are immutable and hold settings only.

    Attributes
    ----------
    name : what the server's options call it.
    observes : whether scores depend on queries; else no `probe` is run for them.
    accumulates : whether a pass adds to the scores of earlier passes.
    pooled : whether scores of consecutive text are max-pooled. Pooling is for scores
        that mark the head of what is worth keeping, as attention does.
    """

    name: str
    observes: ClassVar[bool]
    accumulates: ClassVar[bool]
    pooled: ClassVar[bool]

    @abstractmethod
    def score(self, ctx: ScoreContext) -> torch.Tensor:
        """Score every resident KV of the pass: a new [plan.num_entries] fp32 tensor.

        Values are finite and >= 0, and 0 at positions >= seq_len.
        """
