"""Rows of decode attention, a KV head of a request each: their place, their merge."""

import triton
import triton.language as tl

# Cells of a record (`DecodeWorkspace.records`): where a row lies, and in the records of
# programs also the tiles of the row that the program begins in.
RECORD = tl.constexpr(8)
SLOT = tl.constexpr(0)
FIRST_BLOCK = tl.constexpr(1)
PACKED_LEN = tl.constexpr(2)
FOLD_LEN = tl.constexpr(3)
ENTRIES = tl.constexpr(4)
FIRST_TILE = tl.constexpr(5)
END_TILE = tl.constexpr(6)
ROW = tl.constexpr(7)


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
    """Extent of rows `row`: slot (int64), first block, packed entries, fold length, all
    entries. Lanes outside `mask` give anything.
    """
    slot = tl.load(slots + row // H, mask=mask).to(tl.int64)
    seq_len = tl.load(seq_lens + row // H, mask=mask).to(tl.int32)
    head = block_offsets + slot * (LH + 1) + (layer * H + row % H)
    first_block = tl.load(head, mask=mask)
    packed_len = (tl.load(head + 1, mask=mask) - first_block) * S
    fold_len = tl.load(fold_lens + slot, mask=mask)
    return slot, first_block, packed_len, fold_len, packed_len + seq_len - fold_len


@triton.jit
def row_record(record):
    """Load what `row_extent` gave for a row from its record: independent loads."""
    return (
        tl.load(record + SLOT).to(tl.int64),
        tl.load(record + FIRST_BLOCK),
        tl.load(record + PACKED_LEN),
        tl.load(record + FOLD_LEN),
        tl.load(record + ENTRIES),
    )


@triton.jit
def store_record(record, slot, first_block, packed_len, fold_len, n, mask):
    """Write what `row_record` reads, a record a lane."""
    tl.store(record + SLOT, slot.to(tl.int32), mask=mask)
    tl.store(record + FIRST_BLOCK, first_block, mask=mask)
    tl.store(record + PACKED_LEN, packed_len, mask=mask)
    tl.store(record + FOLD_LEN, fold_len, mask=mask)
    tl.store(record + ENTRIES, n, mask=mask)


@triton.jit
def start_record(record):
    """Load the row that a program begins in: first tile, end tile, its number."""
    return (
        tl.load(record + FIRST_TILE),
        tl.load(record + END_TILE),
        tl.load(record + ROW),
    )


@triton.jit
def store_start(record, first_tile, end_tile, row, mask):
    """Write what `start_record` reads, a record a lane."""
    tl.store(record + FIRST_TILE, first_tile, mask=mask)
    tl.store(record + END_TILE, end_tile, mask=mask)
    tl.store(record + ROW, row, mask=mask)


@triton.jit
def store_row(
    out_row,
    out_head_stride,
    value,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """Write a row's [ROWS, DP] attention output to `out_row`; past G is padding."""
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    cell = g[:, None] * out_head_stride + d[None, :]
    tl.store(out_row + cell, value, mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def store_part(
    work,
    part,
    m,
    denom,
    acc,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
):
    """Write a part of a row, as `attend_tiles` gives it, to cell `part` of the
    `DecodeWorkspace`.
    """
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    row = part * G + g
    cell = row[:, None] * D + d[None, :]
    tl.store(work.partial_max + row, m, mask=g < G)
    tl.store(work.partial_mass + row, denom, mask=g < G)
    tl.store(work.partial_out + cell, acc, mask=(g < G)[:, None] & (d < D)[None, :])


@triton.jit
def merge_parts(
    work,
    first,
    last,
    G: tl.constexpr,
    D: tl.constexpr,
    GR: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """[GR, DP] attention output of one row, from the parts that programs first .. last
    stored; PARTS at a time, in this order whichever program runs it.
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
            work.partial_max + cell,
            mask=ok[:, None],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        mass = tl.load(
            work.partial_mass + cell, mask=ok[:, None], other=0.0, cache_modifier=".cg"
        )
        value = tl.load(
            work.partial_out + cell[:, :, None] * D + d[None, None, :],
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
