"""Triton kernel of `decode_attention`: attention by tiles, with the merge in it.

A *row* is one KV head of one request, row = b * H + h; its entries are cut into tiles
of TILE. The tiles of all rows of a layer, one row after the other, form one list, of
which every program takes an equal, contiguous *share*: long and short heads load the
GPU alike. A row that several programs share is merged by the last of them to arrive.

Logits carry a factor log2(e), so that exp2 serves for exp.

New tokens may be stored here rather than by `append_kv`. The program whose part ends a
row writes its newest K and V, and after a barrier reads them like any others: no other
program reads that cell. Several padding rows may share one; nobody uses what they read.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.append import store_token
from sglang_kvc.kernels.decode_rows import merge_parts, row_record


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
    q,
    arena_k,
    arena_v,
    req_to_token,
    packed_pages,
    cu_tiles,
    shares,
    records,
    partial_out,
    partial_max,
    partial_mass,
    arrivals,
    out,
    query_lse,
    new_k,
    new_v,
    out_cache_loc,
    arena_score,
    query_ring,
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
    GP: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (P,): program p attends over tiles [p * share, (p + 1) * share)
    of the layer's list, row part by row part.

    Pointers: q, out [B, H * G, D], any token and head stride; arena and tables as in
    ``layout``; the plan, cu_tiles, shares and records, as in ``decode_schedule``, of
    which records has planned_programs ahead of the rows; partial_out [2 P, G, D],
    partial_max and partial_mass [2 P, G] fp32; arrivals [B * H] int32, 0 before and
    after; query_lse [slots, LH / H, W, H * G] fp32, or None to record nothing; new_k,
    new_v [B, H, D], any token and head stride, out_cache_loc [B] int64 and query_ring
    [slots, LH / H, W, H * G, D], or None to store nothing. Masked lanes of K and V hold
    0, of the logits -inf.

    Who writes what: the program whose part of a row ends it stores its new token and
    query. A row inside one share is written to `out` directly. Otherwise each program
    of the row stores its part, in cell 2 p if the row began before its share, 2 p + 1
    if it begins in it, and counts itself in arrivals[row]. The last to arrive merges
    all parts in the order of the programs, so the result does not depend on timing,
    writes `out` and sets the count back to 0. Nobody waits.
    """
    p = tl.program_id(0)
    cu = cu_tiles + layer * cu_stride
    share = tl.load(shares + layer)
    first_tile = p * share
    last_tile = tl.minimum(first_tile + share, tl.load(cu + num_rows))
    own = records + layer * records_stride + p * 8
    row_records = records + layer * records_stride + planned_programs * 8
    slot, first_block, packed_len, fold_len, n = row_record(own)
    row_first = tl.load(own + 5)
    row_last = tl.load(own + 6)
    row = tl.load(own + 7)
    g = tl.arange(0, GP)
    r = tl.arange(0, GR)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
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
        if new_k is not None:
            # Loaded together with the query, which is waited for first.
            stored = (d < D) & (end == n)
            k_cell = b * k_token_stride + h * k_head_stride + d
            v_cell = b * v_token_stride + h * v_head_stride + d
            token_k = tl.load(new_k + k_cell, mask=stored, other=0.0)
            token_v = tl.load(new_v + v_cell, mask=stored, other=0.0)
            token = tl.load(out_cache_loc + b)
        query = tl.load(q + q_cell, mask=g_mask, other=0.0)

        position = fold_len + n - packed_len - 1
        # In int32: in int64 it takes the registers that make the kernel spill.
        ring_row = (slot.to(tl.int32) * (LH // H) + layer) * W + position % W
        ring_head = (ring_row * H + h) * G
        if new_k is not None and end == n:
            store_token(
                token_k, token_v, token, lh, arena_k, arena_v, arena_score, LH, D, S, DP
            )
            ring_cell = (ring_head + g).to(tl.int64)[:, None] * D + d[None, :]
            tl.store(query_ring + ring_cell, query, mask=g_mask)
            # All threads read below what some wrote.
            tl.debug_barrier()

        m = tl.full([GP], float("-inf"), tl.float32)
        # A sum for each lane of a tile: one reduction over warps less in the loop.
        mass = tl.zeros([GP, TILE], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        for start in range(begin, end, TILE):
            ok = start + t < end
            arena_row = tile_rows(start, end, lh, *table, LH, S, TILE)
            cell = arena_row[:, None] * D + d[None, :]
            mask = ok[:, None] & (d < D)[None, :]
            k = tl.load(arena_k + cell, mask=mask, other=0.0)
            v = tl.load(arena_v + cell, mask=mask, other=0.0)
            s = tl.dot(query, tl.trans(k), input_precision="ieee") * qk_scale
            s = tl.where(ok[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            decay = tl.exp2(m - m_new)
            prob = tl.exp2(s - m_new[:, None])
            mass = mass * decay[:, None] + prob
            pv = tl.dot(prob.to(v.dtype), v, input_precision="ieee")
            acc = acc * decay[:, None] + pv
            m = m_new
        denom = tl.sum(mass, 1)

        out_row = out + b * out_token_stride + h * G * out_head_stride
        if (row_first >= first_tile) & (row_last <= last_tile):
            out_cell = g[:, None] * out_head_stride + d[None, :]
            tl.store(out_row + out_cell, acc / denom[:, None], mask=g_mask)
            if query_lse is not None:
                lse = m + tl.log2(denom)
                tl.store(query_lse + ring_head + g, lse, mask=g < G)
        else:
            part = 2 * p + (row_first >= first_tile).to(tl.int32)
            part_row = part * G + g
            part_cell = part_row[:, None] * D + d[None, :]
            tl.store(partial_max + part_row, m, mask=g < G)
            tl.store(partial_mass + part_row, denom, mask=g < G)
            tl.store(partial_out + part_cell, acc, mask=g_mask)
            # All threads' stores come before the count of the one that releases it.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu")
            first_program = row_first // share
            last_program = (row_last - 1) // share
            if arrived == last_program - first_program:
                merged, merged_lse = merge_parts(
                    partial_out,
                    partial_max,
                    partial_mass,
                    first_program,
                    last_program,
                    G,
                    D,
                    GR,
                    DP,
                    PARTS,
                )
                r_cell = r[:, None] * out_head_stride + d[None, :]
                r_mask = (r < G)[:, None] & (d < D)[None, :]
                tl.store(out_row + r_cell, merged, mask=r_mask)
                if query_lse is not None:
                    tl.store(query_lse + ring_head + r, merged_lse, mask=r < G)
                tl.store(arrivals + row, 0)
        tile = part_last
        row += 1
        row_first = row_last
        if tile < last_tile:
            slot, first_block, packed_len, fold_len, n = row_record(
                row_records + row * 8
            )
            row_last = tl.load(cu + row + 1)
