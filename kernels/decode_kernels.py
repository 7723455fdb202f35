"""Triton kernel of `decode_attention`: attention by tiles, with the merge in it.

A *row* is one KV head of one request, row = b * H + h; its entries are cut into tiles
of TILE. The tiles of all rows of a layer, one row after the other, form one list, of
which every program takes an equal, contiguous *share*: long and short heads load the
GPU alike. A row that several programs share is merged by the last of them to arrive.

Logits carry a factor log2(e), so that exp2 serves for exp.

New tokens may be stored here rather than by `append_kv`, by the program whose part ends
a row. It attends to the newest from registers, as it will be stored: to read the cell
would take a barrier and wait for memory before the first tile. Several padding rows may
share one cell; nobody uses what they store.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.append import store_token
from sglang_kvc.kernels.decode_rows import (
    RECORD,
    merge_parts,
    row_record,
    start_record,
    store_part,
    store_row,
)
from sglang_kvc.kernels.kv_dtype import (
    load_pairs,
    load_scale,
    matching_query,
    narrow,
    widen,
)
from sglang_kvc.kernels.query_ring import encode_queries, ring_line


@triton.jit
def load_new_token(
    new,
    b,
    h,
    mask,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """[DP] K and V of request `b`, head `h`, and its token id. Lanes not in `mask`, a
    scalar, or past D are 0.
    """
    d = tl.arange(0, DP)
    lane = mask & (d < D)
    # Added to the pointer at the end: the other way round takes a register more.
    k_cell = b * k_token_stride + h * k_head_stride + d
    v_cell = b * v_token_stride + h * v_head_stride + d
    key = tl.load(new.k + k_cell, mask=lane, other=0.0)
    value = tl.load(new.v + v_cell, mask=lane, other=0.0)
    return key, value, tl.load(new.out_cache_loc + b)


@triton.jit
def store_new_token(
    arena,
    new,
    key,
    value,
    token,
    query_row,
    q_head_stride,
    page,
    row_in_ring,
    lh,
    LH: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
):
    """Write K and V, as cells hold them, to head `lh` of `token`, and the G queries at
    `query_row` to a row of the ring if its `page` is not 0.
    """
    g = tl.arange(0, GR)
    d = tl.arange(0, DP)
    store_token(key, value, token, lh, arena.k, arena.v, arena.score, LH, D, S, DP)
    mask = (g < G)[:, None] & (d < D)[None, :]
    query_cell = query_row + g[:, None] * q_head_stride + d[None, :]
    codes = encode_queries(tl.load(query_cell, mask=mask, other=0.0), DP)
    line = ring_line(new.ring_k, new.ring_v, page, row_in_ring, lh, LH, G, D, R, B)
    tl.store(line + g[:, None] * D + d[None, :], codes, mask=mask & (page > 0))


@triton.jit
def attend_new_token(m, denom, acc, logit, value):
    """What `attend_tiles` returned, with one entry more, of `logit` [GP] and `value`
    [DP].
    """
    m_new = tl.maximum(m, logit)
    decay = tl.exp2(m - m_new)
    weight = tl.exp2(logit - m_new)
    acc = acc * decay[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
    return m_new, denom * decay + weight, acc


@triton.jit
def attend_tiles(
    arena,
    table,
    query,
    begin,
    end,
    lh,
    qk_scale,
    LH: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attend from [GP, DP] queries to entries begin .. end - 1 of head `lh`; `begin` is
    the first of a tile, `table` what `tile_rows` takes from packed_len to tail_tokens.

    Returns the largest logits [GP], their sums of 2 ** (logit - largest) [GP] and the
    sums of V so weighted [GP, DP]. Masked lanes of K and V hold 0, of the logits -inf.
    """
    BYTES: tl.constexpr = arena.v.dtype.element_ty == tl.uint8
    # Columns of V and of the output a load: bytes come in pairs, see `load_pairs`.
    VD: tl.constexpr = DP // 2 if BYTES else DP
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    m = tl.full([GP], float("-inf"), tl.float32)
    # A sum for each lane of a tile: one reduction over warps less in the loop.
    mass = tl.zeros([GP, TILE], tl.float32)
    acc = tl.zeros([GP, VD], tl.float32)
    odd_acc = tl.zeros([GP, VD], tl.float32)
    for start in range(begin, end, TILE):
        ok = start + t < end
        arena_row = tile_rows(start, end, lh, *table, LH, S, TILE)
        cell = arena_row[:, None] * D + d[None, :]
        mask = ok[:, None] & (d < D)[None, :]
        k = tl.load(arena.k + cell, mask=mask, other=0.0)
        if BYTES:
            v, v_odd = load_pairs(arena.v, arena_row, ok, query.dtype, D, VD)
        else:
            v = tl.load(arena.v + cell, mask=mask, other=0.0)
        k = widen(k, query.dtype)
        s = tl.dot(query, tl.trans(k), input_precision="ieee") * qk_scale
        s = tl.where(ok[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        decay = tl.exp2(m - m_new)
        prob = tl.exp2(s - m_new[:, None])
        mass = mass * decay[:, None] + prob
        weight = prob.to(v.dtype)
        acc = acc * decay[:, None] + tl.dot(weight, v, input_precision="ieee")
        if BYTES:
            pv = tl.dot(weight, v_odd, input_precision="ieee")
            odd_acc = odd_acc * decay[:, None] + pv
        m = m_new
    if BYTES:
        acc = tl.interleave(acc, odd_acc)
    return m, tl.sum(mass, 1), acc


@triton.jit(
    do_not_specialize=[
        "cu_stride",
        "planned_programs",
        "records_stride",
        "layer",
        "num_rows",
    ]
)
def decode_tiles_kernel(
    arena,
    req_to_token,
    packed_pages,
    work,
    q,
    new,
    out,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    out_token_stride,
    out_head_stride,
    token_table_stride,
    page_table_stride,
    cu_stride,
    planned_programs,
    records_stride,
    layer,
    num_rows,
    qk_scale,
    LH: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    GP: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (P,): program p attends over tiles [p * share, (p + 1) * share)
    of the layer's list, row part by row part.

    Pointers: arena an `Arena` and tables as in ``layout``; work a `DecodeWorkspace`, of
    whose records planned_programs are ahead of the rows, with arrivals 0 before and
    after; q, out [B, H * G, D], any token and head stride; new a `KernelTokens`, or
    None to store nothing.

    Who writes what: the program whose part of a row ends it stores its new token and
    query. A row inside one share is written to `out` directly. Otherwise each program
    of the row stores its part, in cell 2 p if the row began before its share, 2 p + 1
    if it begins in it, and counts itself in arrivals[row]. The last to arrive merges
    all parts in the order of the programs, so the result does not depend on timing,
    writes `out` and sets the count back to 0. Nobody waits.
    """
    p = tl.program_id(0)
    cu = work.cu_tiles + layer * cu_stride
    share = tl.load(work.shares + layer)
    first_tile = p * share
    last_tile = tl.minimum(first_tile + share, tl.load(cu + num_rows))
    records = work.records + layer * records_stride
    row_records = records + planned_programs * RECORD
    slot, first_block, packed_len, fold_len, n = row_record(records + p * RECORD)
    row_first, row_last, row = start_record(records + p * RECORD)
    k_scale = load_scale(arena.scales, layer)
    v_scale = load_scale(arena.scales, LH // H + layer)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    g_mask = (g < G)[:, None] & (d < D)[None, :]

    tile = first_tile
    while tile < last_tile:
        part_last = tl.minimum(row_last, last_tile)
        b = (row // H).to(tl.int64)
        h = row % H
        q_head = h * G + g
        q_cell = b * q_token_stride + q_head[:, None] * q_head_stride + d[None, :]
        tail_tokens = req_to_token + slot * token_table_stride + fold_len - packed_len
        pages = packed_pages + slot * page_table_stride
        table = (packed_len, first_block, pages, tail_tokens)
        lh = layer * H + h
        begin = (tile - row_first) * TILE
        end = tl.minimum((part_last - row_first) * TILE, n)
        row_in_ring = (fold_len + n - packed_len - 1) % W
        ends_row = end == n
        if new is not None:
            # Loaded together with the query, which is waited for first.
            strides = (k_token_stride, k_head_stride, v_token_stride, v_head_stride)
            key, value, token = load_new_token(new, b, h, ends_row, *strides, D, DP)
            page = tl.load(work.ring_pages + b)
        query = matching_query(tl.load(q + q_cell, mask=g_mask, other=0.0), arena.k)
        logit_scale = qk_scale * k_scale

        if new is not None:
            end -= ends_row.to(tl.int32)
            key = narrow(key, k_scale, arena.k)
            value = narrow(value, v_scale, arena.v)
            wide = widen(key, query.dtype).to(tl.float32)
            logit = tl.sum(query.to(tl.float32) * wide[None, :], 1) * logit_scale
        if new is not None and ends_row:
            # The query once more, from L1: without the rows that pad it for products.
            store_new_token(
                arena,
                new,
                key,
                value,
                token,
                q + b * q_token_stride + h * G * q_head_stride,
                q_head_stride,
                page,
                row_in_ring,
                lh,
                LH,
                G,
                D,
                S,
                R,
                B,
                GR,
                DP,
            )

        m, denom, acc = attend_tiles(
            arena, table, query, begin, end, lh, logit_scale, LH, D, S, GP, DP, TILE
        )
        if new is not None and ends_row:
            m, denom, acc = attend_new_token(
                m, denom, acc, logit, widen(value, query.dtype)
            )
        # Of the next row, or the last of all: waited for while this one is stored.
        next_row = tl.minimum(row + 1, num_rows - 1)
        record = row_record(row_records + next_row * RECORD)
        next_last = tl.load(cu + next_row + 1)

        acc = acc * v_scale
        out_row = out + b * out_token_stride + h * G * out_head_stride
        if (row_first >= first_tile) & (row_last <= last_tile):
            store_row(out_row, out_head_stride, acc / denom[:, None], G, D, GP, DP)
        else:
            part = 2 * p + (row_first >= first_tile).to(tl.int32)
            store_part(work, part, m, denom, acc, G, D, GP, DP)
            # All threads' stores come before the count of the one that releases it.
            tl.debug_barrier()
            arrived = tl.atomic_add(work.arrivals + row, 1, sem="acq_rel", scope="gpu")
            first_program = row_first // share
            last_program = (row_last - 1) // share
            if arrived == last_program - first_program:
                merged = merge_parts(
                    work, first_program, last_program, G, D, GR, DP, PARTS
                )
                store_row(out_row, out_head_stride, merged, G, D, GR, DP)
                tl.store(work.arrivals + row, 0)
        tile = part_last
        row += 1
        slot, first_block, packed_len, fold_len, n = record
        row_first = row_last
        row_last = next_last
