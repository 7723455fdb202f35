"""Score a key by how little it resembles the other keys of its head (KeyDiff).

score(i) = 1 - cos(k_i, a),  a = sum over the head's entries j of k_j / |k_j|

KeyDiff (arXiv 2504.15364) keeps the lowest cosine with the mean of the normalised keys;
the sum has the same direction, and 1 makes the score non-negative: it lies in [0, 2]
but for rounding at 2. No query is needed. Keys are read after RoPE, as they lie in the
arena; every entry up to seq_len counts for the anchor, sinks and protected ones too. A
key or an anchor of length 0 has cosine 0. Everything is fp32. Scores belong to one
pass: stored ones are not read. The scale of a layer in e4m3 changes no cosine and is
left out.

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
from sglang_kvc.kernels.kv_dtype import gather_rows, stored_bytes
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import (
    head_pages,
    head_walk,
    load_rows,
    plan_head,
    plan_heads_ref,
    split_heads,
)

# Shortest length that is divided by, as in torch.nn.functional.normalize.
TINY = tl.constexpr(1e-12)


def key_diff_ref(arena: Arena, tables: BlockTables, plan: PassPlan) -> torch.Tensor:
    """Plain torch form of `key_diff`; one head at a time."""
    normalize = torch.nn.functional.normalize
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    for head in plan_heads_ref(tables, plan):
        unit = normalize(gather_rows(arena.k, head.rows), dim=-1)
        anchor = normalize(unit.sum(0), dim=-1)
        scores[head.cells] = (1 - unit @ anchor).clamp_(min=0)
    return scores


@triton.jit
def _inverse_length(square):
    """1 / sqrt(square), finite for 0."""
    return 1.0 / tl.maximum(tl.sqrt_rn(square), TINY)


@triton.jit(do_not_specialize=["first_request"])
def anchor_kernel(
    arena_k,
    walk,
    partial,
    token_table_stride,
    page_table_stride,
    first_request,
    LH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (requests * LH, P): program (x, y) sums the normalised keys of tiles y,
    y + P, ... of head x % LH of request first_request + x // LH.

    Pointers: arena as in ``layout``; walk a `HeadWalk`; partial
    [requests * LH, P, D] fp32: each program writes its own row, 0 if it has no tile.
    """
    x = tl.program_id(0)
    r = first_request + x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, _, _ = plan_head(walk, r, lh, LH, S)
    pages, tail_tokens = head_pages(
        walk, slot, fold_len, packed_len, token_table_stride, page_table_stride
    )
    total = tl.zeros([DP], tl.float32)

    for i in range(tl.program_id(1) * TILE, n, tl.num_programs(1) * TILE):
        entry = i + tl.arange(0, TILE)
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        key = load_rows(arena_k, arena_row, valid, D, DP)
        total += tl.sum(key * _inverse_length(tl.sum(key * key, 1))[:, None], 0)
    d = tl.arange(0, DP)
    out = x.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial + out * D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["first_request"])
def key_diff_kernel(
    arena_k,
    walk,
    partial,
    scores,
    token_table_stride,
    page_table_stride,
    first_request,
    LH: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid as `anchor_kernel`: program (x, y) scores the tiles that it summed there.

    Every program merges its head's P partial sums, in the same order: scores do not
    depend on timing. Pointers as there; scores [num_entries] fp32, padding entries
    are written as 0.
    """
    x = tl.program_id(0)
    r = first_request + x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, size, first_cell = plan_head(
        walk, r, lh, LH, S
    )
    pages, tail_tokens = head_pages(
        walk, slot, fold_len, packed_len, token_table_stride, page_table_stride
    )
    d = tl.arange(0, DP)
    part = partial + x.to(tl.int64) * tl.num_programs(1) * D
    anchor = tl.zeros([DP], tl.float32)
    for y in range(0, tl.num_programs(1)):
        anchor += tl.load(part + y * D + d, mask=d < D, other=0.0)
    anchor *= _inverse_length(tl.sum(anchor * anchor, 0))

    for i in range(tl.program_id(1) * TILE, size, tl.num_programs(1) * TILE):
        entry = i + tl.arange(0, TILE)
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        key = load_rows(arena_k, arena_row, valid, D, DP)
        cosine = tl.sum(key * anchor[None, :], 1)
        cosine *= _inverse_length(tl.sum(key * key, 1))
        score = tl.where(valid, tl.maximum(1.0 - cosine, 0.0), 0.0)
        tl.store(scores + first_cell + entry, score, mask=entry < size)


def key_diff_triton(arena: Arena, tables: BlockTables, plan: PassPlan) -> torch.Tensor:
    """Triton form of `key_diff`; two launches, more for many requests."""
    tile = 64
    num_requests, heads = plan.slots.shape[0], arena.heads_per_page
    # Several tiles a program, so that merging costs less than summing.
    values = arena.head_dim
    splits, chunk = split_heads(plan, heads, entries=8 * tile, values=values)
    device = arena.k.device
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=device)
    partial = torch.empty(
        chunk * heads * splits * values, dtype=torch.float32, device=device
    )
    inputs = (stored_bytes(arena.k), head_walk(tables, plan), partial)
    axes = {
        "LH": heads,
        "D": arena.head_dim,
        "DP": triton.next_power_of_2(arena.head_dim),
        "S": PAGE_SIZE,
        "TILE": tile,
        "num_warps": 4,
    }
    for first in range(0, num_requests, chunk):
        grid = (min(chunk, num_requests - first) * heads, splits)
        anchor_kernel[grid](*inputs, *tables.row_strides, first, **axes)
        key_diff_kernel[grid](*inputs, scores, *tables.row_strides, first, **axes)
    return scores


def key_diff(arena: Arena, tables: BlockTables, plan: PassPlan) -> torch.Tensor:
    """Score every resident KV of the plan's requests by its key alone.

    Parameters
    ----------
    arena, tables, plan : only read.

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32, every element written.
    """
    triton_op, ref_op = key_diff_triton, key_diff_ref
    return (triton_op if use_triton(arena.k) else ref_op)(arena, tables, plan)
