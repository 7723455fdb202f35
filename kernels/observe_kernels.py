"""Triton kernels of `observe_scores`.

Observed rows of (request, KV head): m = j * G + g is query head g of the group at ring
row j, M = w * G rows. `lse_kernel` and `merge_lse_kernel` find each row's log-sum-exp
over the entries it sees; `score_kernel` recomputes the logits, key tile by key tile,
and sums prob ** power over the rows. Logits carry log2(e): exp2 and log2 throughout.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import entry_rows

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
    ring_row = (slot * L + lh // H) * W + row // G
    cell = ring_row * (H * G) + (lh % H) * G + row % G
    mask = (position >= 0)[:, None] & (d < D)[None, :]
    return tl.load(query_ring + cell[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_keys(arena_k, arena_row, valid, D: tl.constexpr, DP: tl.constexpr):
    """Load the [entries, DP] key tile; 0 in lanes that are not valid."""
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < D)[None, :]
    return tl.load(arena_k + arena_row[:, None] * D + d[None, :], mask=mask, other=0.0)


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
    [requests * L * H, P, W * G] fp32, written in full: -inf where a row sees
    nothing of the share. Rows are taken ROWS at a time.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    r = first_request + x // LH
    lh = x % LH
    slot = tl.load(slots + r)
    seq_len = tl.load(seq_lens + r).to(tl.int32)
    fold_len = tl.load(folds + r).to(tl.int32)
    query_start = tl.load(query_starts + r).to(tl.int32)
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    last_block = tl.load(block_offsets + slot * (LH + 1) + lh + 1)
    packed_len = (last_block - first_block) * S
    n = packed_len + seq_len - fold_len
    share = tl.cdiv(tl.cdiv(n, num_splits), TILE) * TILE
    start = split * share
    end = tl.minimum(start + share, n)
    tokens = req_to_token + slot * token_table_stride
    pages = packed_pages + slot * page_table_stride
    t = tl.arange(0, TILE)
    out = partial_lse + (x.to(tl.int64) * num_splits + split) * (W * G)

    for first_row in range(0, W * G, ROWS):
        row = first_row + tl.arange(0, ROWS)
        position = _query_rows(row, seq_len, query_start, G, W)
        query = _load_queries(query_ring, slot, lh, row, position, L, H, G, W, D, DP)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        denom = tl.zeros([ROWS], tl.float32)
        for i in range(start, end, TILE):
            entry = i + t
            valid = entry < end
            arena_row = entry_rows(
                entry,
                valid,
                lh,
                packed_len,
                fold_len,
                first_block,
                tokens,
                pages,
                LH,
                S,
            )
            key = _load_keys(arena_k, arena_row, valid, D, DP)
            at = tl.where(entry < packed_len, -1, fold_len + entry - packed_len)
            s = tl.dot(query, tl.trans(key), input_precision="ieee") * qk_scale
            visible = valid[None, :] & (at[None, :] <= position[:, None])
            s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # A row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            denom = denom * tl.exp2(m - shift) + tl.sum(tl.exp2(s - shift[:, None]), 1)
            m = m_new
        lse = tl.where(denom > 0, m + tl.log2(tl.maximum(denom, 1e-38)), float("-inf"))
        tl.store(out + row, lse, mask=row < W * G)


@triton.jit(do_not_specialize=["num_splits"])
def merge_lse_kernel(
    partial_lse,
    lse,
    num_splits,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (heads, row blocks): log-sum-exp over dim 1 of [heads, num_splits, ROWS]."""
    x = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, MAX_SPLITS)
    part = tl.load(
        partial_lse + (x * num_splits + split[:, None]) * ROWS + row[None, :],
        mask=(split < num_splits)[:, None] & (row < ROWS)[None, :],
        other=float("-inf"),
    )
    m = tl.max(part, 0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    denom = tl.sum(tl.exp2(part - shift[None, :]), 0)
    merged = tl.where(
        denom > 0, shift + tl.log2(tl.maximum(denom, 1e-38)), float("-inf")
    )
    tl.store(lse + x * ROWS + row, merged, mask=row < ROWS)


@triton.jit(do_not_specialize=["first_request"])
def score_kernel(
    query_ring,
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
    entry_base,
    lse,
    scores,
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
    POWER: tl.constexpr,
):
    """Grid (requests * L * H, P): program (x, y) scores key tiles y, y + P, ... of head
    x % (L * H) of request first_request + x // (L * H).

    Pointers as in `lse_kernel`; lse [requests * L * H, W * G] fp32 of this launch's
    heads; scores [num_entries] fp32: each program writes its own tiles, padding
    entries (positions >= seq_len) as 0.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    r = first_request + x // LH
    lh = x % LH
    slot = tl.load(slots + r)
    seq_len = tl.load(seq_lens + r).to(tl.int32)
    fold_len = tl.load(folds + r).to(tl.int32)
    query_start = tl.load(query_starts + r).to(tl.int32)
    tail = tl.load(tail_blocks + r)
    annotated = tl.load(is_first + r) == 0
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    last_block = tl.load(block_offsets + slot * (LH + 1) + lh + 1)
    packed_len = (last_block - first_block) * S
    n = packed_len + seq_len - fold_len
    size = packed_len + tail.to(tl.int32) * S
    tokens = req_to_token + slot * token_table_stride
    pages = packed_pages + slot * page_table_stride
    out = scores + tl.load(entry_base + r) + (first_block + lh * tail) * S
    lse += x.to(tl.int64) * (W * G)
    t = tl.arange(0, TILE)

    for i in range(tl.program_id(1) * TILE, size, tl.num_programs(1) * TILE):
        entry = i + t
        valid = entry < n
        arena_row = entry_rows(
            entry,
            valid,
            lh,
            packed_len,
            fold_len,
            first_block,
            tokens,
            pages,
            LH,
            S,
        )
        key = _load_keys(arena_k, arena_row, valid, D, DP)
        at = tl.where(entry < packed_len, -1, fold_len + entry - packed_len)
        total = tl.load(arena_score + arena_row, mask=valid & annotated, other=0.0)
        for first_row in range(0, W * G, ROWS):
            row = first_row + tl.arange(0, ROWS)
            position = _query_rows(row, seq_len, query_start, G, W)
            query = _load_queries(
                query_ring, slot, lh, row, position, L, H, G, W, D, DP
            )
            row_lse = tl.load(lse + row, mask=row < W * G, other=0.0)
            s = tl.dot(key, tl.trans(query), input_precision="ieee") * qk_scale
            visible = valid[:, None] & (at[:, None] <= position[None, :])
            p = tl.where(visible, tl.exp2(s - row_lse[None, :]), 0.0)
            if POWER == 2:
                p = p * p
            total += tl.sum(p, 1)
        tl.store(out + entry, total, mask=entry < size)
