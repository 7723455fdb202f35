"""Triton kernel of `observe_scores`: prob ** power summed over the observed rows.

It computes the logits again, key tile by key tile, with the log2-sum-exp2s that
`lse_kernel` has worked out from the same queries. Logits carry log2(e): exp2
throughout. Values, where they count, are read while the tensor cores work: the kernel
is bound by its products.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.kv_dtype import load_scale, matching_dtype
from sglang_kvc.kernels.observe_rows import load_heads, load_queries, query_rows
from sglang_kvc.kernels.plan_heads import head_pages, plan_head


@triton.jit
def _attention_mass(key, query, row_lse, qk_scale, POWER: tl.constexpr):
    """[TILE, ROWS] probabilities ** POWER of the keys for rows that see all of them."""
    s = tl.dot(key, tl.trans(query), input_precision="ieee") * qk_scale
    p = tl.exp2(s - row_lse[None, :])
    if POWER == 2:
        p = p * p
    return p


@triton.jit
def _lengths(arena_v, arena_row, valid, v_scale, D: tl.constexpr, DP: tl.constexpr):
    """L2 norms of values, fp32."""
    value = load_heads(arena_v, arena_row, valid, tl.float32, D, DP).to(tl.float32)
    return tl.sqrt_rn(tl.sum(value * value, 1)) * v_scale


@triton.jit
def score_kernel(
    arena_k,
    arena_v,
    arena_score,
    arena_scales,
    walk,
    query_starts,
    is_first,
    repeated,
    ring_k,
    ring_v,
    ring_pages,
    query_lse,
    scores,
    token_table_stride,
    page_table_stride,
    qk_scale,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    POWER: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Grid (R * L * H, P): program (x, y) scores key tiles y, y + P, ... of head
    x % (L * H) of request x // (L * H).

    Pointers: arena and ring as in ``layout``; walk a `HeadWalk`; query_starts, is_first
    and repeated [R] int64; query_lse [R, L * H, W * G] fp32; scores [num_entries] fp32:
    each program writes its own tiles, padding entries (positions >= seq_len) as 0. With
    ROWS >= W * G all queries stay in the program; else they are read again for every
    tile, ROWS at a time. NORMS: weigh new mass by the length of the value.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, size, first_cell = plan_head(
        walk, r, lh, LH, S
    )
    seq_len = fold_len + n - packed_len
    query_start = tl.load(query_starts + r).to(tl.int32)
    annotated = tl.load(is_first + r) == 0
    again = tl.load(repeated + r) != 0
    pages, tail_tokens = head_pages(
        walk, slot, fold_len, packed_len, token_table_stride, page_table_stride
    )
    out = scores + first_cell
    qk_scale = qk_scale * load_scale(arena_scales, lh // H)
    v_scale = load_scale(arena_scales, L + lh // H)
    t = tl.arange(0, TILE)
    rings = (ring_k, ring_v, ring_pages)

    row = tl.arange(0, ROWS)
    position = query_rows(row, seq_len, query_start, G, W)
    dtype: tl.constexpr = matching_dtype(arena_k.dtype.element_ty)
    query = load_queries(*rings, slot, lh, row, position, dtype, LH, G, D, DP, R, B, N)
    head_lse = query_lse + x.to(tl.int64) * (W * G)
    # A row that is not observed gives every key 2 ** -inf.
    row_lse = tl.load(head_lse + row, mask=position >= 0, other=float("inf"))
    # Entries before this one are seen by every observed row.
    oldest = tl.maximum(tl.maximum(seq_len - W, query_start), 0)
    clear = packed_len + tl.maximum(oldest + 1 - fold_len, 0)

    first = tl.program_id(1) * TILE
    step = tl.num_programs(1) * TILE
    clear_tiles = clear // TILE * TILE if ROWS >= W * G else 0
    for i in range(first, clear_tiles, step):
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        key = load_heads(arena_k, arena_row, None, query.dtype, D, DP)
        old = tl.load(arena_score + arena_row, mask=annotated, other=0.0)
        new = tl.sum(_attention_mass(key, query, row_lse, qk_scale, POWER), 1)
        if NORMS:
            new *= _lengths(arena_v, arena_row, None, v_scale, D, DP)
        tl.store(out + i + t, tl.where(again, tl.maximum(old, new), old + new))

    done = tl.maximum(tl.cdiv(clear_tiles - first, step), 0) * step
    for i in range(first + done, size, step):
        entry = i + t
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        key = load_heads(arena_k, arena_row, valid, query.dtype, D, DP)
        at = tl.where(entry < packed_len, -1, fold_len + entry - packed_len)
        old = tl.load(arena_score + arena_row, mask=valid & annotated, other=0.0)
        new = tl.zeros([TILE], tl.float32)
        if ROWS >= W * G:
            p = _attention_mass(key, query, row_lse, qk_scale, POWER)
            visible = valid[:, None] & (at[:, None] <= position[None, :])
            new += tl.sum(tl.where(visible, p, 0.0), 1)
        else:
            for first_row in range(0, W * G, ROWS):
                row = first_row + tl.arange(0, ROWS)
                position = query_rows(row, seq_len, query_start, G, W)
                query = load_queries(
                    *rings, slot, lh, row, position, dtype, LH, G, D, DP, R, B, N
                )
                row_lse = tl.load(
                    head_lse + row, mask=position >= 0, other=float("inf")
                )
                p = _attention_mass(key, query, row_lse, qk_scale, POWER)
                visible = valid[:, None] & (at[:, None] <= position[None, :])
                new += tl.sum(tl.where(visible, p, 0.0), 1)
        if NORMS:
            new *= _lengths(arena_v, arena_row, valid, v_scale, D, DP)
        total = tl.where(again, tl.maximum(old, new), old + new)
        tl.store(out + entry, total, mask=entry < size)
