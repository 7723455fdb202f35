"""Triton kernel of `decode_attention`: attention by tiles, with the merge in it.

A *row* is one KV head of one request, row = b * H + h; its entries are cut into tiles
of TILE. The tiles of all rows of a layer, one row after the other, form one list, of
which every program takes an equal, contiguous *share*: long and short heads load the
GPU alike. A row that several programs share is merged by the last of them to arrive.

Logits carry a factor log2(e), so that exp2 serves for exp.

With programmatic dependent launch (PDL) the kernel may start while the one before it
runs. Why that is safe:

* What the last kernel wrote (q, the new token's K and V) is read after gdc_wait, which
  returns when that kernel has ended and its writes are visible; nothing is written
  before it. All programs wait, so this kernel cannot end before the last one.
* What is read before gdc_wait (plan, slots, seq_lens, tables) must have been written by
  kernels that ended before the last one began. Append is launched without PDL and only
  then tells its dependents to launch, so this holds after append; it does not where
  `plan_decode` itself is the last kernel. The caller says which (`after_append`).
* Consecutive layers share the partial results and `arrivals`. This kernel never
  tells its dependents to launch: a kernel launched normally after it starts when it has
  ended, and the next call, also one without append between, writes after its gdc_wait.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.decode_rows import (
    look_up,
    looked_up_rows,
    row_extent,
    row_record,
)


@triton.jit
def _merge_parts(
    partial_out,
    partial_max,
    partial_mass,
    first,
    last,
    G: tl.constexpr,
    D: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """[GR, DP] attention output of one row and its [GR] log2-sum-exp2, from its parts
    of programs first .. last; PARTS at a time, in this order whichever program runs it.
    """
    j = tl.arange(0, PARTS)
    g = tl.arange(0, GR)
    d = tl.arange(0, DP)
    g_cell = tl.minimum(g, G - 1)
    m = tl.full([GR], float("-inf"), tl.float32)
    denom = tl.zeros([GR], tl.float32)
    acc = tl.zeros([GR, DP], tl.float32)
    for start in tl.range(first, last + 1, PARTS, num_stages=1):
        program = start + j
        ok = program <= last
        part = 2 * program + (program == first).to(tl.int32)
        cell = part[:, None] * G + g_cell[None, :]
        # .cg: other multiprocessors wrote these, and L1 is not coherent.
        top = tl.load(
            partial_max + cell,
            mask=ok[:, None],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        mass = tl.load(
            partial_mass + cell, mask=ok[:, None], other=0.0, cache_modifier=".cg"
        )
        value = tl.load(
            partial_out + cell[:, :, None] * D + d[None, None, :],
            mask=ok[:, None, None] & (d < D)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        m_new = tl.maximum(m, tl.max(top, 0))
        decay = tl.exp2(m - m_new)
        weight = tl.exp2(top - m_new[None, :])
        denom = denom * decay + tl.sum(mass * weight, 0)
        acc = acc * decay[:, None] + tl.sum(value * weight[:, :, None], 0)
        m = m_new
    return acc / denom[:, None], m + tl.log2(denom)


@triton.jit(
    do_not_specialize=[
        "cu_stride",
        "first_stride",
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
    fold_lens,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    cu_tiles,
    first_rows,
    shares,
    records,
    partial_out,
    partial_max,
    partial_mass,
    arrivals,
    out,
    query_lse,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    token_table_stride,
    page_table_stride,
    cu_stride,
    first_stride,
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
    RECORDS: tl.constexpr,
    AHEAD: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Grid (P,): program p attends over tiles [p * share, (p + 1) * share)
    of the layer's list, row part by row part.

    Pointers: q, out [B, H * G, D], any token and head stride; arena and tables as in
    ``layout``; slots, seq_lens [B]; the plan as in ``decode_schedule``: cu_tiles,
    first_rows, shares and, if RECORDS, records, else row by row from the tables;
    partial_out [2 P, G, D], partial_max and partial_mass [2 P, G] fp32; arrivals
    [B * H] int32, 0 before and after; query_lse [slots, LH / H, W, H * G] fp32, or None
    to record nothing. Masked lanes of K and V hold 0, of the logits -inf.

    WAIT: 0 not launched with PDL; 1 gdc_wait before every read; 2 gdc_wait after the
    reads of the plan, for a call right after append.

    Who writes what: a row inside one share is written to `out` directly. Otherwise
    each program of the row stores its part, in cell 2 p if the row began before its
    share, 2 p + 1 if it begins in it, and counts itself in arrivals[row]. The last to
    arrive merges all parts in the order of the programs, so the result does not depend
    on timing, writes `out` and sets the count back to 0. Nobody waits.
    """
    if WAIT == 1:
        tl.extra.cuda.gdc_wait()
    p = tl.program_id(0)
    cu = cu_tiles + layer * cu_stride
    share = tl.load(shares + layer)
    first_tile = p * share
    last_tile = tl.minimum(first_tile + share, tl.load(cu + num_rows))
    if RECORDS:
        own = records + layer * records_stride + p * 8
        row_records = records + layer * records_stride + first_stride * 8
        slot, first_block, packed_len, fold_len, n = row_record(own)
        row_first = tl.load(own + 5)
        row_last = tl.load(own + 6)
        row = tl.load(own + 7)
    else:
        row = tl.load(first_rows + layer * first_stride + p)
    g = tl.arange(0, GP)
    r = tl.arange(0, GR)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    g_mask = (g < G)[:, None] & (d < D)[None, :]
    if WAIT == 2:
        tl.extra.cuda.gdc_wait()

    tile = first_tile
    while tile < last_tile:
        if not RECORDS:
            slot, first_block, packed_len, fold_len, n = row_extent(
                row, None, layer, fold_lens, block_offsets, slots, seq_lens, LH, H, S
            )
            row_first = tl.load(cu + row)
            row_last = tl.load(cu + row + 1)
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
        if AHEAD:
            # Before the query, which is waited for as soon as it is loaded.
            index = look_up(begin, end, *table, LH, S, TILE)
        query = tl.load(q + q_cell, mask=g_mask, other=0.0)

        if query_lse is not None:
            position = fold_len + n - packed_len - 1
            lse_row = (slot * (LH // H) + layer) * W + position % W
            lse_cell = query_lse + (lse_row * H + h) * G

        m = tl.full([GP], float("-inf"), tl.float32)
        # A sum for each lane of a tile: one reduction over warps less in the loop.
        mass = tl.zeros([GP, TILE], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        for start in range(begin, end, TILE):
            ok = start + t < end
            if AHEAD:
                arena_row = looked_up_rows(
                    index, start, lh, packed_len, first_block, LH, S, TILE
                )
                index = look_up(start + TILE, end, *table, LH, S, TILE)
            else:
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
                tl.store(lse_cell + g, m + tl.log2(denom), mask=g < G)
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
                merged, lse = _merge_parts(
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
                    tl.store(lse_cell + r, lse, mask=r < G)
                tl.store(arrivals + row, 0)
        tile = part_last
        row += 1
        if RECORDS:
            row_first = row_last
            if tile < last_tile:
                slot, first_block, packed_len, fold_len, n = row_record(
                    row_records + row * 8
                )
                row_last = tl.load(cu + row + 1)
