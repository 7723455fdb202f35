"""Triton kernels of `decode_attention`: split-K over one head's entries, then merge.

Logits carry a factor log2(e), so that exp2 and log2 serve for exp and log.
"""

import triton
import triton.language as tl


@triton.jit
def _attend_tile(
    query,
    row,
    ok,
    arena_k,
    arena_v,
    m,
    denom,
    acc,
    qk_scale,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """One step of online softmax over the arena rows `row` [TILE] that are `ok`."""
    d = tl.arange(0, DP)
    mask = ok[:, None] & (d < D)[None, :]
    cell = row[:, None] * D + d[None, :]
    k = tl.load(arena_k + cell, mask=mask, other=0.0)
    v = tl.load(arena_v + cell, mask=mask, other=0.0)
    s = tl.dot(query, tl.trans(k), input_precision="ieee") * qk_scale
    s = tl.where(ok[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    decay = tl.exp2(m - m_new)
    p = tl.exp2(s - m_new[:, None])
    denom = denom * decay + tl.sum(p, 1)
    pv = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, denom, acc * decay[:, None] + pv


@triton.jit
def _share(n, NUM_SPLITS: tl.constexpr, MIN_SHARE: tl.constexpr, TILE: tl.constexpr):
    """Entries a split of a head with n entries: equal, whole tiles, not too few."""
    share = tl.cdiv(tl.cdiv(n, NUM_SPLITS), TILE) * TILE
    return tl.maximum(share, MIN_SHARE)


@triton.jit(do_not_specialize=["layer"])
def decode_split_kernel(
    q,
    arena_k,
    arena_v,
    req_to_token,
    fold_lens,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    partial_out,
    partial_lse,
    q_token_stride,
    q_head_stride,
    token_table_stride,
    page_table_stride,
    layer,
    qk_scale,
    LH: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
):
    """Grid (B, H, NUM_SPLITS): program (b, h, s) attends from the G query heads of KV
    head h of request b to one contiguous share of its entries.

    Pointers: q [B, H * G, D], any token and head stride; arena and tables as in
    ``layout``; slots, seq_lens [B]; partial_out [B, H * G, NUM_SPLITS, D] and
    partial_lse [B, H * G, NUM_SPLITS] fp32. Shares are whole tiles, at least MIN_SHARE
    entries; a program without a share returns at once and writes nothing. Masked lanes
    of K and V hold 0, of the logits -inf. Each program writes its own rows only.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    split = tl.program_id(2)
    slot = tl.load(slots + b).to(tl.int64)
    lh = layer * H + h
    fold_len = tl.load(fold_lens + slot)
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    last_block = tl.load(block_offsets + slot * (LH + 1) + lh + 1)
    packed_len = (last_block - first_block) * S
    n = packed_len + tl.load(seq_lens + b).to(tl.int32) - fold_len
    share = _share(n, NUM_SPLITS, MIN_SHARE, TILE)
    start = split * share
    if start >= n:
        return
    end = tl.minimum(start + share, n)

    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    q_head = h * G + g
    q_row = b.to(tl.int64) * q_token_stride + q_head * q_head_stride
    q_mask = (g < G)[:, None] & (d < D)[None, :]
    query = tl.load(q + q_row[:, None] + d[None, :], mask=q_mask, other=0.0)
    m = tl.full([GP], float("-inf"), tl.float32)
    denom = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)

    pages = packed_pages + slot * page_table_stride
    packed_end = tl.minimum(end, packed_len)
    for i in range(start, packed_end, TILE):
        ok = i + t < packed_end
        ordinal = first_block + (i + t) // S
        page = tl.load(pages + ordinal // LH, mask=ok, other=0).to(tl.int64)
        row = (page * LH + ordinal % LH) * S + t % S
        m, denom, acc = _attend_tile(
            query, row, ok, arena_k, arena_v, m, denom, acc, qk_scale, D, DP
        )

    # fold_len and packed_len are multiples of S, so a tail page starts at lane 0 of 16.
    tokens = req_to_token + slot * token_table_stride + (fold_len - packed_len)
    for i in range(tl.maximum(start, packed_len), end, TILE):
        ok = i + t < end
        token = tl.load(tokens + i + t, mask=ok, other=0).to(tl.int64)
        row = (token // S * LH + lh) * S + token % S
        m, denom, acc = _attend_tile(
            query, row, ok, arena_k, arena_v, m, denom, acc, qk_scale, D, DP
        )

    out_row = (b.to(tl.int64) * (H * G) + q_head) * NUM_SPLITS + split
    tl.store(partial_lse + out_row, m + tl.log2(denom), mask=g < G)
    tl.store(
        partial_out + out_row[:, None] * D + d[None, :],
        acc / denom[:, None],
        mask=q_mask,
    )


@triton.jit(do_not_specialize=["layer"])
def decode_merge_kernel(
    partial_out,
    partial_lse,
    out,
    fold_lens,
    block_offsets,
    slots,
    seq_lens,
    out_token_stride,
    out_head_stride,
    layer,
    LH: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
):
    """Grid (B, H * G): program (b, j) averages the splits of query head j of request b,
    weighted by their softmax mass. Splits that had no share hold old data and are
    masked: lse -inf, out 0. Pointers as in the split kernel; out [B, H * G, D].
    """
    b = tl.program_id(0)
    j = tl.program_id(1)
    slot = tl.load(slots + b).to(tl.int64)
    head = block_offsets + slot * (LH + 1) + layer * H + j // G
    packed_len = (tl.load(head + 1) - tl.load(head)) * S
    n = packed_len + tl.load(seq_lens + b).to(tl.int32) - tl.load(fold_lens + slot)
    share = _share(n, NUM_SPLITS, MIN_SHARE, TILE)

    split = tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, DP)
    used = split * share < n
    row = (b.to(tl.int64) * (H * G) + j) * NUM_SPLITS + split
    lse = tl.load(partial_lse + row, mask=used, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    mask = used[:, None] & (d < D)[None, :]
    part = tl.load(partial_out + row[:, None] * D + d[None, :], mask=mask, other=0.0)
    merged = tl.sum(part * weight[:, None], 0)
    out_row = b.to(tl.int64) * out_token_stride + j * out_head_stride
    tl.store(out + out_row + d, merged, mask=d < D)
