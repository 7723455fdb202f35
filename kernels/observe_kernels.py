"""Triton kernels of `observe_scores`.

Observed rows of (request, KV head): m = j * G + g is query head g of the group at ring
row j, M = w * G rows. `lse_kernel` and `merge_lse_kernel` find the log2-sum-exp2 of
rows that decode attention has not recorded; `score_kernel` computes the logits again,
key tile by key tile, and sums prob ** power over the rows. Logits carry log2(e): exp2
and log2 throughout.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.plan_heads import plan_head

# Position of a row or an entry that sees, or shows, nothing.
HIDDEN = tl.constexpr(-2)


@triton.jit
def _query_rows(row, seq_len, query_start, G: tl.constexpr, W: tl.constexpr):
    """Positions of rows `row` (HIDDEN: not observed): the largest p < seq_len with
    p % W = row // G, if it is at least query_start.
    """
    j = row // G
    position = seq_len - 1 - (seq_len - 1 - j + W) % W
    seen = (j < W) & (position >= query_start) & (position >= 0)
    return tl.where(seen, position, HIDDEN)


@triton.jit
def _ring_cell(
    slot, lh, row, L: tl.constexpr, H: tl.constexpr, G: tl.constexpr, W: tl.constexpr
):
    """Index of row `row` of head `lh` in [slots, L, W, H * G]."""
    ring_row = (slot * L + lh // H) * W + row // G
    return ring_row * (H * G) + (lh % H) * G + row % G


@triton.jit
def _load_queries(
    query_ring,
    slot,
    lh,
    row,
    position,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Load the [rows, DP] query tile of observed rows; 0 in all other lanes."""
    d = tl.arange(0, DP)
    cell = _ring_cell(slot, lh, row, L, H, G, W)
    mask = (position >= 0)[:, None] & (d < D)[None, :]
    return tl.load(query_ring + cell[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_keys(arena_k, arena_row, valid, D: tl.constexpr, DP: tl.constexpr):
    """Load the [entries, DP] key tile; 0 in lanes that are not `valid` (None: all)."""
    d = tl.arange(0, DP)
    cell = arena_k + arena_row[:, None] * D + d[None, :]
    if valid is not None:
        mask = valid[:, None] & (d < D)[None, :]
        key = tl.load(cell, mask=mask, other=0.0)
    elif D < DP:
        key = tl.load(cell, mask=(d < D)[None, :], other=0.0)
    else:
        key = tl.load(cell)
    return key


@triton.jit(do_not_specialize=["first_request"])
def lse_kernel(
    query_ring,
    arena_k,
    req_to_token,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    folds,
    query_starts,
    tail_blocks,
    entry_base,
    recorded,
    partial_lse,
    token_table_stride,
    page_table_stride,
    first_request,
    qk_scale,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (requests * L * H, P): program (x, s) reduces one of P equal shares of the
    entries of head x % (L * H) of request first_request + x // (L * H).

    Pointers: ring, arena, tables as in ``layout``; plan vectors [R] int64; partial_lse
    [requests * L * H, P, W * G] fp32: -inf where a row sees nothing of the share, not
    written for recorded requests. Rows are taken ROWS at a time.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    r = first_request + x // LH
    lh = x % LH
    if tl.load(recorded + r) == 0:
        slot, fold_len, first_block, packed_len, n, _, _ = plan_head(
            block_offsets, slots, seq_lens, folds, tail_blocks, entry_base, r, lh, LH, S
        )
        seq_len = fold_len + n - packed_len
        query_start = tl.load(query_starts + r).to(tl.int32)
        share = tl.cdiv(tl.cdiv(n, num_splits), TILE) * TILE
        start = split * share
        end = tl.minimum(start + share, n)
        tail_tokens = req_to_token + slot * token_table_stride + fold_len - packed_len
        pages = packed_pages + slot * page_table_stride
        t = tl.arange(0, TILE)
        out = partial_lse + (x.to(tl.int64) * num_splits + split) * (W * G)

        for first_row in range(0, W * G, ROWS):
            row = first_row + tl.arange(0, ROWS)
            position = _query_rows(row, seq_len, query_start, G, W)
            query = _load_queries(
                query_ring, slot, lh, row, position, L, H, G, W, D, DP
            )
            m = tl.full([ROWS], float("-inf"), tl.float32)
            denom = tl.zeros([ROWS], tl.float32)
            for i in range(start, end, TILE):
                entry = i + t
                valid = entry < end
                arena_row = tile_rows(
                    i, end, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
                )
                key = _load_keys(arena_k, arena_row, valid, D, DP)
                at = tl.where(entry < packed_len, -1, fold_len + entry - packed_len)
                s = tl.dot(query, tl.trans(key), input_precision="ieee") * qk_scale
                visible = valid[None, :] & (at[None, :] <= position[:, None])
                s = tl.where(visible, s, float("-inf"))
                m_new = tl.maximum(m, tl.max(s, 1))
                # A row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN.
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
                mass = tl.sum(tl.exp2(s - shift[:, None]), 1)
                denom = denom * tl.exp2(m - shift) + mass
                m = m_new
            lse = m + tl.log2(tl.maximum(denom, 1e-38))
            lse = tl.where(denom > 0, lse, float("-inf"))
            tl.store(out + row, lse, mask=row < W * G)


@triton.jit(do_not_specialize=["num_splits", "first_request"])
def merge_lse_kernel(
    partial_lse,
    query_lse,
    slots,
    recorded,
    num_splits,
    first_request,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (requests * L * H, row blocks): log2-sum-exp2 over dim 1 of the partials
    [requests * L * H, num_splits, W * G] into query_lse [slots, L, W, H * G] fp32.
    """
    x = tl.program_id(0).to(tl.int64)
    r = first_request + x // (L * H)
    if tl.load(recorded + r) == 0:
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        split = tl.arange(0, MAX_SPLITS)
        part = tl.load(
            partial_lse + (x * num_splits + split[:, None]) * (W * G) + row[None, :],
            mask=(split < num_splits)[:, None] & (row < W * G)[None, :],
            other=float("-inf"),
        )
        m = tl.max(part, 0)
        shift = tl.where(m == float("-inf"), 0.0, m)
        denom = tl.sum(tl.exp2(part - shift[None, :]), 0)
        merged = shift + tl.log2(tl.maximum(denom, 1e-38))
        merged = tl.where(denom > 0, merged, float("-inf"))
        cell = _ring_cell(tl.load(slots + r), x % (L * H), row, L, H, G, W)
        tl.store(query_lse + cell, merged, mask=row < W * G)


@triton.jit
def _attention_mass(key, query, row_lse, qk_scale, POWER: tl.constexpr):
    """[TILE, ROWS] probabilities ** POWER of the keys for rows that see all of them."""
    s = tl.dot(key, tl.trans(query), input_precision="ieee") * qk_scale
    p = tl.exp2(s - row_lse[None, :])
    if POWER == 2:
        p = p * p
    return p


@triton.jit
def score_kernel(
    query_ring,
    query_lse,
    arena_k,
    arena_score,
    req_to_token,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    folds,
    query_starts,
    tail_blocks,
    is_first,
    repeated,
    entry_base,
    scores,
    token_table_stride,
    page_table_stride,
    qk_scale,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    POWER: tl.constexpr,
):
    """Grid (R * L * H, P): program (x, y) scores key tiles y, y + P, ... of head
    x % (L * H) of request x // (L * H).

    Pointers: ring, lse, arena and tables as in ``layout``; plan vectors [R] int64;
    scores [num_entries] fp32: each program writes its own tiles, padding entries
    (positions >= seq_len) as 0. With ROWS >= W * G all queries stay in the program;
    else they are read again for every tile, ROWS at a time.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, size, first_cell = plan_head(
        block_offsets, slots, seq_lens, folds, tail_blocks, entry_base, r, lh, LH, S
    )
    seq_len = fold_len + n - packed_len
    query_start = tl.load(query_starts + r).to(tl.int32)
    annotated = tl.load(is_first + r) == 0
    again = tl.load(repeated + r) != 0
    tail_tokens = req_to_token + slot * token_table_stride + fold_len - packed_len
    pages = packed_pages + slot * page_table_stride
    out = scores + first_cell
    t = tl.arange(0, TILE)

    row = tl.arange(0, ROWS)
    position = _query_rows(row, seq_len, query_start, G, W)
    query = _load_queries(query_ring, slot, lh, row, position, L, H, G, W, D, DP)
    cell = _ring_cell(slot, lh, row, L, H, G, W)
    # A row that is not observed gives every key 2 ** -inf.
    row_lse = tl.load(query_lse + cell, mask=position >= 0, other=float("inf"))
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
        key = _load_keys(arena_k, arena_row, None, D, DP)
        old = tl.load(arena_score + arena_row, mask=annotated, other=0.0)
        new = tl.sum(_attention_mass(key, query, row_lse, qk_scale, POWER), 1)
        tl.store(out + i + t, tl.where(again, tl.maximum(old, new), old + new))

    done = tl.maximum(tl.cdiv(clear_tiles - first, step), 0) * step
    for i in range(first + done, size, step):
        entry = i + t
        valid = entry < n
        arena_row = tile_rows(
            i, n, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
        )
        key = _load_keys(arena_k, arena_row, valid, D, DP)
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
                position = _query_rows(row, seq_len, query_start, G, W)
                query = _load_queries(
                    query_ring, slot, lh, row, position, L, H, G, W, D, DP
                )
                cell = _ring_cell(slot, lh, row, L, H, G, W)
                row_lse = tl.load(
                    query_lse + cell, mask=position >= 0, other=float("inf")
                )
                p = _attention_mass(key, query, row_lse, qk_scale, POWER)
                visible = valid[:, None] & (at[:, None] <= position[None, :])
                new += tl.sum(tl.where(visible, p, 0.0), 1)
        total = tl.where(again, tl.maximum(old, new), old + new)
        tl.store(out + entry, total, mask=entry < size)
