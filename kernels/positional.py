"""Scores that look at no query and no key: recency, and a random choice.

recency(i) = 1 / (1 + d),  d = entries of the head behind i

For a tail entry d = seq_len - 1 - position. The position of a packed entry is not
stored, but entries keep their order: if recency alone chose the survivors, they are
the sinks and the latest entries, and d is again the distance in the text. Counting from
the end makes scores comparable across heads: all heads have the same seq_len, so heads
of equal size price their blocks equally and a joint budget takes the same entries from
each (as many blocks go as there are heads, times a whole number). Where heads are
unequal for another reason the longest loses first, until they are level. Counting from
the start would reward heads for what they hold. Up to 2 ** 23 entries scores differ.

random(i) = stored(i) where a pass has drawn it, else hash(seed, slot, seq_len, lh, p)

A score is drawn once, in the first pass that sees the entry (p is its position there),
and kept, so that what is held after several passes is a uniform sample of everything
seen; fresh draws would favour recent entries, which have survived fewer of them. Drawn
scores lie in (0, 1); 0 in the arena says that none was. With `seq_len` the next request
in a slot draws otherwise. The hash is integer arithmetic: both forms agree bit for bit.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``scores``              [plan.num_entries]     fp32 workspace, layout in `PassPlan`;
                                               0 at positions >= seq_len
======================  =====================  =========================================
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import (
    head_pages,
    head_walk,
    plan_head,
    plan_heads_ref,
    programs_per_head,
)

SEED_LIMIT = 1 << 31


def _mix(x):
    """Hash int64 values in [0, 2**32) within it: a bijection, two multiply rounds.

    The multipliers are below 2**30, so that nothing overflows.
    """
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    x = (x ^ (x >> 12)) * 0x297A2D39 & 0xFFFFFFFF
    return x ^ (x >> 15)


# One text for torch and Triton.
_mix_kernel = triton.jit(_mix)


def recency_scores_ref(
    arena: Arena, tables: BlockTables, plan: PassPlan
) -> torch.Tensor:
    """Plain torch form of `recency_scores`; one head at a time."""
    device = arena.k.device
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=device)
    for head in plan_heads_ref(tables, plan):
        behind = torch.arange(head.rows.shape[0] - 1, -1, -1, device=device)
        scores[head.cells] = 1 / (1 + behind.float())
    return scores


def random_scores_ref(
    arena: Arena, tables: BlockTables, plan: PassPlan, *, seed: int
) -> torch.Tensor:
    """Plain torch form of `random_scores`; one head at a time."""
    device, stored = arena.k.device, arena.score.view(-1)
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=device)
    for head in plan_heads_ref(tables, plan):
        request, n = head.request, head.rows.shape[0]
        key = _mix(_mix(_mix(_mix(seed) ^ request.slot) ^ request.seq_len) ^ head.lh)
        position = request.seq_len - n + torch.arange(n, device=device)
        drawn = ((_mix(position ^ key) >> 9).float() + 0.5) * 2**-23
        if not request.is_first:
            kept = stored[head.rows]
            drawn = torch.where(kept > 0, kept, drawn)
        scores[head.cells] = drawn
    return scores


@triton.jit
def recency_kernel(
    walk,
    scores,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (R * LH, P): program (x, y) scores tiles y, y + P, ... of head x % LH of
    request x // LH.

    Pointers: walk a `HeadWalk`; scores [num_entries] fp32: each program writes its own
    tiles, padding entries as 0.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    _, _, _, _, n, size, first_cell = plan_head(walk, r, lh, LH, S)
    for i in range(tl.program_id(1) * TILE, size, tl.num_programs(1) * TILE):
        entry = i + tl.arange(0, TILE)
        # n - entry is 1 + d; padding must not divide by 0.
        score = tl.div_rn(1.0, tl.maximum(n - entry, 1).to(tl.float32))
        score = tl.where(entry < n, score, 0.0)
        tl.store(scores + first_cell + entry, score, mask=entry < size)


@triton.jit(do_not_specialize=["seed"])
def random_kernel(
    arena_score,
    walk,
    is_first,
    scores,
    token_table_stride,
    page_table_stride,
    seed,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid and ownership as `recency_kernel`; arena as in ``layout``, is_first [R]
    int64.

    Where no score is stored the draw hashes the entry's position (int64 throughout).
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, size, first_cell = plan_head(
        walk, r, lh, LH, S
    )
    annotated = tl.load(is_first + r) == 0
    seq_len = tl.load(walk.seq_lens + r)
    pages, tail_tokens = head_pages(
        walk, slot, fold_len, packed_len, token_table_stride, page_table_stride
    )
    key = _mix_kernel(_mix_kernel(_mix_kernel(seed.to(tl.int64)) ^ slot) ^ seq_len)
    key = _mix_kernel(key ^ lh)

    for i in range(tl.program_id(1) * TILE, size, tl.num_programs(1) * TILE):
        entry = i + tl.arange(0, TILE)
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        kept = tl.load(arena_score + arena_row, mask=valid & annotated, other=0.0)
        hashed = _mix_kernel((seq_len - n + entry) ^ key)
        # 23 bits and a half: exact in fp32, never 0 or 1.
        drawn = ((hashed >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
        score = tl.where(kept > 0, kept, drawn)
        score = tl.where(valid, score, 0.0)
        tl.store(scores + first_cell + entry, score, mask=entry < size)


def recency_scores_triton(
    arena: Arena, tables: BlockTables, plan: PassPlan
) -> torch.Tensor:
    """Triton form of `recency_scores`; one launch."""
    tile = 1024
    rows = plan.slots.shape[0] * arena.heads_per_page
    tiles = -(-plan.max_blocks * PAGE_SIZE // tile)
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    recency_kernel[(rows, programs_per_head(rows, tiles))](
        head_walk(tables, plan),
        scores,
        LH=arena.heads_per_page,
        S=PAGE_SIZE,
        TILE=tile,
        num_warps=4,
    )
    return scores


def random_scores_triton(
    arena: Arena, tables: BlockTables, plan: PassPlan, *, seed: int
) -> torch.Tensor:
    """Triton form of `random_scores`; one launch."""
    tile = 512
    rows = plan.slots.shape[0] * arena.heads_per_page
    tiles = -(-plan.max_blocks * PAGE_SIZE // tile)
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    random_kernel[(rows, programs_per_head(rows, tiles))](
        arena.score,
        head_walk(tables, plan),
        plan.is_first,
        scores,
        *tables.row_strides,
        seed,
        LH=arena.heads_per_page,
        S=PAGE_SIZE,
        TILE=tile,
        num_warps=4,
    )
    return scores


def recency_scores(arena: Arena, tables: BlockTables, plan: PassPlan) -> torch.Tensor:
    """Score every resident KV of the plan's requests by how recent it is.

    Parameters
    ----------
    arena : only its shape and device count.
    tables, plan : only read.

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32 in [0, 1], every element written.
    """
    op = recency_scores_triton if use_triton(arena.k) else recency_scores_ref
    return op(arena, tables, plan)


def random_scores(
    arena: Arena, tables: BlockTables, plan: PassPlan, *, seed: int
) -> torch.Tensor:
    """Draw a score for every resident KV of the plan's requests that has none yet.

    Parameters
    ----------
    arena, tables, plan : only read.
    seed : in [0, 2**31).

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32 in [0, 1), every element written.

    Raises
    ------
    ValueError : `seed` is out of range.
    """
    if not 0 <= seed < SEED_LIMIT:
        raise ValueError(f"seed must be in [0, {SEED_LIMIT}), got {seed}")
    op = random_scores_triton if use_triton(arena.k) else random_scores_ref
    return op(arena, tables, plan, seed=seed)
