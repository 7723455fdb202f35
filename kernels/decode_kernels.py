"""Triton kernel of `decode_attention`: attention by tiles, with the merge in it.

A *row* is one KV head of one request, row = b * H + h; its entries are cut into tiles
of TILE. The tiles of all rows of a layer, one row after the other, form one list, of
which every program takes an equal, contiguous *share*: long and short heads load the
GPU alike. A row that several programs share is merged by the last of them to arrive.

Logits carry a factor log2(e), so that exp2 serves for exp.
"""

import triton
import triton.language as tl


@triton.jit
def row_extent(
    row,
    mask,
    layer,
    fold_lens,
    block_offsets,
    slots,
    seq_lens,
    LH: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
):
    """Where row `row` (scalar or vector) lies: slot (int64), first block, packed
    entries, fold length, all entries. Lanes outside `mask` give anything.
    """
    slot = tl.load(slots + row // H, mask=mask).to(tl.int64)
    seq_len = tl.load(seq_lens + row // H, mask=mask).to(tl.int32)
    head = block_offsets + slot * (LH + 1) + (layer * H + row % H)
    first_block = tl.load(head, mask=mask)
    packed_len = (tl.load(head + 1, mask=mask) - first_block) * S
    fold_len = tl.load(fold_lens + slot, mask=mask)
    return slot, first_block, packed_len, fold_len, packed_len + seq_len - fold_len


@triton.jit
def tile_share(total, MIN_SHARE: tl.constexpr, NUM_PROGRAMS: tl.constexpr):
    """Tiles a program, of `total` tiles in the layer."""
    return tl.maximum(tl.cdiv(total, NUM_PROGRAMS), MIN_SHARE)


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
    """[GR, DP] attention output of one row, from its parts of programs first .. last;
    PARTS at a time, in this order whichever program runs it.
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
    return acc / denom[:, None]


@triton.jit
def _tile_rows(
    start,
    end,
    lh,
    packed_len,
    first_block,
    pages,
    tail_tokens,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE] int64 arena rows of entries start .. start + TILE - 1 of head `lh`.

    `addressing.entry_rows` for a tile that begins at a page: packed_len and fold_len
    are multiples of S, so that one table cell serves S entries. `tail_tokens` points at
    the request's row of ``req_to_token``, fold_len - packed_len further on. Blocks that
    begin at `end` or later read nothing and lie in page 0.
    """
    entry = start + tl.arange(0, TILE // S) * S
    is_packed = entry < packed_len
    ordinal = first_block + entry // S
    cell = tl.where(is_packed, pages + ordinal // LH, tail_tokens + entry)
    index = tl.load(cell, mask=entry < end, other=0)
    page = tl.where(is_packed, index, index // S).to(tl.int64)
    block = page * LH + tl.where(is_packed, ordinal % LH, lh)
    row = block[:, None] * S + tl.arange(0, S)[None, :]
    return tl.reshape(row, [TILE])


@triton.jit(do_not_specialize=["cu_stride", "first_stride", "layer", "num_rows"])
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
    partial_out,
    partial_max,
    partial_mass,
    arrivals,
    out,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    token_table_stride,
    page_table_stride,
    cu_stride,
    first_stride,
    layer,
    num_rows,
    qk_scale,
    LH: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (NUM_PROGRAMS,): program p attends over tiles [p * share, (p + 1) * share)
    of the layer's list, row part by row part.

    Pointers: q, out [B, H * G, D], any token and head stride; arena and tables as in
    ``layout``; slots, seq_lens [B]; cu_tiles, first_rows from ``decode_schedule``;
    partial_out [2 * NUM_PROGRAMS, G, D], partial_max and partial_mass
    [2 * NUM_PROGRAMS, G] fp32; arrivals [B * H] int32, 0 before and after. Masked lanes
    of K and V hold 0, of the logits -inf.

    Who writes what: a row inside one share is written to `out` directly. Otherwise
    each program of the row stores its part, in cell 2 p if the row began before its
    share, 2 p + 1 if it begins in it, and counts itself in arrivals[row]. The last to
    arrive merges all parts in the order of the programs, so the result does not depend
    on timing, writes `out` and sets the count back to 0. Nobody waits.
    """
    p = tl.program_id(0)
    cu = cu_tiles + layer * cu_stride
    share = tile_share(tl.load(cu + num_rows), MIN_SHARE, NUM_PROGRAMS)
    first_tile = p * share
    last_tile = tl.minimum(first_tile + share, tl.load(cu + num_rows))
    row = tl.load(first_rows + layer * first_stride + p)
    g = tl.arange(0, GP)
    r = tl.arange(0, GR)
    d = tl.arange(0, DP)
    t = tl.arange(0, TILE)
    g_mask = (g < G)[:, None] & (d < D)[None, :]

    tile = first_tile
    while tile < last_tile:
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
        query = tl.load(q + q_cell, mask=g_mask, other=0.0)
        tail_tokens = req_to_token + slot * token_table_stride + fold_len - packed_len
        pages = packed_pages + slot * page_table_stride

        m = tl.full([GP], float("-inf"), tl.float32)
        # A sum for each lane of a tile: one reduction over warps less in the loop.
        mass = tl.zeros([GP, TILE], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        end = tl.minimum((part_last - row_first) * TILE, n)
        for start in range((tile - row_first) * TILE, end, TILE):
            ok = start + t < end
            arena_row = _tile_rows(
                start,
                end,
                layer * H + h,
                packed_len,
                first_block,
                pages,
                tail_tokens,
                LH,
                S,
                TILE,
            )
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
                merged = _merge_parts(
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
                tl.store(arrivals + row, 0)
        tile = part_last
        row += 1
