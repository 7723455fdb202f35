"""Max-pool new scores along key positions, the less the farther away:

    out[i] = max(s[i], gain * max of s[j] * decay ** |i - j| over j from i - back
                 to i + ahead)

A query that looks for something attends to where the text says what follows; the rest
of it gets its turn only while it is read. Pooling lets what lies up to `back` behind a
match, and a little ahead of it, stay with it. A match far above the rest keeps all of
that at any gain and decay; where many are about equal, what was looked at itself comes
before what lies beside it, and that nearest first.

Only the tail of a request is pooled, and only where the plan says so: its entries are
consecutive text. Neighbours belong to the same head, to the tail and to positions <
seq_len. Packed entries, whose neighbours in memory are not neighbours in the text, and
padding are copied; their scores were pooled before.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``scores``, result      [plan.num_entries]     fp32 workspace, layout in `PassPlan`
======================  =====================  =========================================
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import head_walk, plan_head, plan_tails_ref


class Pooling(NamedTuple):
    """Spread of a score over its neighbours: how far, and what it counts for there.

    Attributes
    ----------
    back, ahead : how far before and behind an entry its window reaches.
    decay : in (0, 1], what is left of a score with every entry of distance.
    gain : in (0, 1], what another entry's score counts for beside an entry's own.
    """

    back: int
    ahead: int
    decay: float
    gain: float

    def factor(self, shift: int) -> float:
        """Weight of the score of the entry `shift` places on."""
        return self.gain * self.decay ** abs(shift) if shift else 1.0


def pool_rows_ref(rows: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool each row of `rows` [heads, n], scores >= 0, by itself."""
    n = rows.shape[1]
    back, ahead = pooling.back, pooling.ahead
    padded = F.pad(rows, (back, ahead))
    near = (
        padded[:, back + shift : back + shift + n] * pooling.factor(shift)
        for shift in range(-back, ahead + 1)
    )
    return functools.reduce(torch.maximum, near)


def pool_scores_ref(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    *,
    pooling: Pooling,
) -> torch.Tensor:
    """Plain torch form of `pool_scores`."""
    pooled = scores.clone()
    for tail in plan_tails_ref(tables, plan):
        if tail.request.pool_tail:
            entry = torch.arange(tail.request.tail_len, device=scores.device)
            index = tail.starts[:, None] + entry
            pooled[index] = pool_rows_ref(scores[index], pooling)
    return pooled


@triton.jit
def pool_kernel(
    walk,
    pool_tail,
    scores,
    pooled,
    LH: tl.constexpr,
    S: tl.constexpr,
    BACK: tl.constexpr,
    AHEAD: tl.constexpr,
    DECAY: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH, P): program (x, y) writes blocks y, y + P, ... of head x % LH of
    request x // LH: the window maximum of tail entries to be pooled, else a copy.

    Pointers: walk a `HeadWalk`; pool_tail [R] int64; scores, pooled [num_entries] fp32
    >= 0. Lanes outside the tail count as 0; each entry is written by one program.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    _, _, _, packed_len, n, size, base = plan_head(walk, r, lh, LH, S)
    reach = tl.where(tl.load(pool_tail + r) != 0, n, 0)

    for i in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        entry = i + tl.arange(0, BLOCK)
        own = scores + base + entry
        best = tl.load(own, mask=entry < size, other=0.0)
        tail = (entry >= packed_len) & (entry < reach)
        # Unrolled: distances, and so the factors, are known to the compiler.
        for back in tl.static_range(1, BACK + 1):
            inside = tail & (entry - back >= packed_len)
            near = tl.load(own - back, mask=inside, other=0.0)
            best = tl.maximum(best, near * (GAIN * DECAY**back))
        for ahead in tl.static_range(1, AHEAD + 1):
            inside = tail & (entry + ahead < reach)
            near = tl.load(own + ahead, mask=inside, other=0.0)
            best = tl.maximum(best, near * (GAIN * DECAY**ahead))
        tl.store(pooled + base + entry, best, mask=entry < size)


def pool_scores_triton(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    *,
    pooling: Pooling,
) -> torch.Tensor:
    """Triton form of `pool_scores`."""
    pooled = torch.empty_like(scores)
    block, heads = 1024, tables.heads_per_page
    rows = plan.slots.shape[0] * heads
    pool_kernel[(rows, -(-plan.max_blocks * PAGE_SIZE // block))](
        head_walk(tables, plan),
        plan.pool_tail,
        scores,
        pooled,
        LH=heads,
        S=PAGE_SIZE,
        BACK=pooling.back,
        AHEAD=pooling.ahead,
        DECAY=pooling.decay,
        GAIN=pooling.gain,
        BLOCK=block,
        num_warps=4,
    )
    return pooled


def pool_scores(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    *,
    pooling: Pooling,
) -> torch.Tensor:
    """Smooth the scores of new text: a new tensor, or `scores` if there is none.

    Parameters
    ----------
    tables, plan : as they were when the scores were made; only read.
    scores : [plan.num_entries] fp32 >= 0 from `observe_scores`.
    pooling : how scores spread.
    """
    if not (pooling.back or pooling.ahead) or not plan.any_pooled:
        return scores
    op = pool_scores_triton if use_triton(scores) else pool_scores_ref
    return op(tables, plan, scores, pooling=pooling)
