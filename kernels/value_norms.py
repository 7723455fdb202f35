"""Weigh attention mass by the length of the value that it moves.

score(i) = stored(i) + mass(i) * |v_i|

``mass`` is what `observe_scores` finds when it ignores stored scores; ``stored`` is the
running score in the arena, taken as 0 in a first pass. |v| is the L2 norm, in fp32.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``mass``, ``scores``    [plan.num_entries]     fp32 workspace, layout in `PassPlan`;
                                               scores are 0 at positions >= seq_len
======================  =====================  =========================================
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import (
    load_rows,
    plan_head,
    plan_heads_ref,
    programs_per_head,
)


def value_norms_ref(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    mass: torch.Tensor,
) -> torch.Tensor:
    """Plain torch form of `value_norms`; one head at a time."""
    values, stored = arena.v.view(-1, arena.head_dim), arena.score.view(-1)
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=arena.v.device)
    for head in plan_heads_ref(tables, plan, arena.heads_per_page):
        score = values[head.rows].float().norm(dim=-1) * mass[head.cells]
        if head.annotated:
            old = stored[head.rows]
            score = torch.maximum(score, old) if head.repeated else score + old
        scores[head.cells] = score
    return scores


@triton.jit
def value_norm_kernel(
    arena_v,
    arena_score,
    mass,
    req_to_token,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    folds,
    tail_blocks,
    is_first,
    repeated,
    entry_base,
    scores,
    token_table_stride,
    page_table_stride,
    LH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (R * LH, P): program (x, y) scores tiles y, y + P, ... of head x % LH of
    request x // LH.

    Pointers: arena and tables as in ``layout``; plan vectors [R] int64; mass and scores
    [num_entries] fp32. Each program writes its own tiles, padding entries as 0. Lanes
    d >= D are masked.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, size, first_cell = plan_head(
        block_offsets, slots, seq_lens, folds, tail_blocks, entry_base, r, lh, LH, S
    )
    annotated = tl.load(is_first + r) == 0
    again = tl.load(repeated + r) != 0
    tail_tokens = req_to_token + slot * token_table_stride + fold_len - packed_len
    pages = packed_pages + slot * page_table_stride

    for i in range(tl.program_id(1) * TILE, size, tl.num_programs(1) * TILE):
        entry = i + tl.arange(0, TILE)
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        value = load_rows(arena_v, arena_row, valid, D, DP)
        score = tl.sqrt_rn(tl.sum(value * value, 1))
        score *= tl.load(mass + first_cell + entry, mask=valid, other=0.0)
        old = tl.load(arena_score + arena_row, mask=valid & annotated, other=0.0)
        score = tl.where(again, tl.maximum(old, score), old + score)
        tl.store(scores + first_cell + entry, score, mask=entry < size)


def value_norms_triton(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    mass: torch.Tensor,
) -> torch.Tensor:
    """Triton form of `value_norms`; one launch."""
    tile = 64
    rows = plan.slots.shape[0] * arena.heads_per_page
    tiles = -(-plan.max_blocks * PAGE_SIZE // tile)
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=arena.v.device)
    value_norm_kernel[(rows, programs_per_head(rows, tiles))](
        arena.v,
        arena.score,
        mass,
        tables.req_to_token,
        tables.block_offsets,
        tables.packed_pages,
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.tail_blocks,
        plan.is_first,
        plan.repeated,
        plan.entry_base,
        scores,
        tables.req_to_token.stride(0),
        tables.packed_pages.stride(0),
        LH=arena.heads_per_page,
        D=arena.head_dim,
        DP=triton.next_power_of_2(arena.head_dim),
        S=PAGE_SIZE,
        TILE=tile,
        num_warps=4,
    )
    return scores


def value_norms(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    mass: torch.Tensor,
) -> torch.Tensor:
    """Score every resident KV of the plan's requests by mass times norm of its value.

    Parameters
    ----------
    arena, tables, plan : only read.
    mass : [plan.num_entries] fp32 >= 0, new attention mass; only read.

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32, every element written.
    """
    op = value_norms_triton if use_triton(arena.v) else value_norms_ref
    return op(arena, tables, plan, mass)
