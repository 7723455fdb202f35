"""Rows of decode attention, a KV head of a request each: their place, their merge."""

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
    """Where rows `row` lie: slot (int64), first block, packed entries, fold length, all
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
    """What `row_extent` gave for a row, from its record: independent loads."""
    return (
        tl.load(record).to(tl.int64),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
    )


@triton.jit
def merge_parts(
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
