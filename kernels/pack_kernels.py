"""Triton kernels of `pack_entries` and `commit_tables`: pure data movement."""

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    arena_k,
    arena_v,
    arena_score,
    source_rows,
    kept_scores,
    dest_pages,
    num_kept,
    LH: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (cdiv(num_kept, BLOCK)): program x moves kept entries [x, x + 1) * BLOCK.

    Pointers: arena as in ``layout``; source_rows [num_kept] int32, kept_scores
    [num_kept] fp32, dest_pages [num_kept // (S * LH)] int64. Lanes past num_kept are
    masked. Destination pages are fresh: no program reads what another one writes.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    ok = m < num_kept
    mask = ok[:, None] & (d < D)[None, :]
    block = m // S
    page = tl.load(dest_pages + block // LH, mask=ok, other=0)
    dest = (page * LH + block % LH) * S + m % S
    source = tl.load(source_rows + m, mask=ok, other=0).to(tl.int64)
    source_cell = source[:, None] * D + d[None, :]
    dest_cell = dest[:, None] * D + d[None, :]
    key = tl.load(arena_k + source_cell, mask=mask, other=0.0)
    value = tl.load(arena_v + source_cell, mask=mask, other=0.0)
    score = tl.load(kept_scores + m, mask=ok, other=0.0)
    tl.store(arena_k + dest_cell, key, mask=mask)
    tl.store(arena_v + dest_cell, value, mask=mask)
    tl.store(arena_score + dest, score, mask=ok)


@triton.jit
def annotate_kernel(
    arena_score,
    scores,
    req_to_token,
    block_offsets,
    slots,
    seq_lens,
    folds_old,
    folds_new,
    tail_blocks,
    entry_base,
    token_table_stride,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x stores the scores of what stays in the tail of its head:
    positions fold_new .. seq_len - 1, in the request's own pages.

    Pointers: arena_score [pages, LH, S] fp32; scores [num_entries] fp32; plan vectors
    [R] int64; block_offsets before the pass. Programs write disjoint cells.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot = tl.load(slots + r)
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    packed_len = (tl.load(block_offsets + slot * (LH + 1) + lh + 1) - first_block) * S
    fold_old = tl.load(folds_old + r)
    # Workspace index of position 0, were it in the tail.
    base = tl.load(entry_base + r) + (first_block + lh * tl.load(tail_blocks + r)) * S
    base += packed_len - fold_old
    start = tl.load(folds_new + r).to(tl.int32)
    end = tl.load(seq_lens + r).to(tl.int32)
    tokens = req_to_token + slot * token_table_stride
    for i in range(start, end, BLOCK):
        position = i + tl.arange(0, BLOCK)
        ok = position < end
        token = tl.load(tokens + position, mask=ok, other=0).to(tl.int64)
        score = tl.load(scores + base + position, mask=ok, other=0.0)
        row = (token // S * LH + lh) * S + token % S
        tl.store(arena_score + row, score, mask=ok)


@triton.jit
def publish_kernel(
    fold_lens,
    block_offsets,
    packed_pages,
    slots,
    folds_new,
    keep_base,
    new_offsets,
    dest_pages,
    page_table_stride,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R): program r overwrites the tables' rows of its request.

    Pointers: tables as in ``layout``; new_offsets [R, LH + 1] int32; dest_pages int64.
    The slots of a plan differ.
    """
    r = tl.program_id(0)
    slot = tl.load(slots + r)
    tl.store(fold_lens + slot, tl.load(folds_new + r).to(tl.int32))
    offsets = new_offsets + r.to(tl.int64) * (LH + 1)
    for i in range(0, LH + 1, BLOCK):
        lh = i + tl.arange(0, BLOCK)
        offset = tl.load(offsets + lh, mask=lh <= LH, other=0)
        tl.store(block_offsets + slot * (LH + 1) + lh, offset, mask=lh <= LH)
    num_pages = tl.load(offsets + LH) // LH
    pages = dest_pages + tl.load(keep_base + r) // (S * LH)
    for i in range(0, num_pages, BLOCK):
        p = i + tl.arange(0, BLOCK)
        page = tl.load(pages + p, mask=p < num_pages, other=0).to(tl.int32)
        tl.store(packed_pages + slot * page_table_stride + p, page, mask=p < num_pages)
