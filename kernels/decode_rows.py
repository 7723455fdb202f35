"""Where decode attention finds a row, that is one KV head of one request."""

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
def row_record(record):
    """What `row_extent` gives for one row, from its record: independent loads."""
    return (
        tl.load(record).to(tl.int64),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
    )


@triton.jit
def look_up(
    start,
    end,
    packed_len,
    first_block,
    pages,
    tail_tokens,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE // S] int32 table cells of the tile that begins at entry `start`.

    The load in `addressing.tile_rows`, which says what the arguments are; blocks that
    begin at `end` or later give 0.
    """
    entry = start + tl.arange(0, TILE // S) * S
    is_packed = entry < packed_len
    ordinal = first_block + entry // S
    cell = tl.where(is_packed, pages + ordinal // LH, tail_tokens + entry)
    return tl.load(cell, mask=entry < end, other=0)


@triton.jit
def looked_up_rows(
    index,
    start,
    lh,
    packed_len,
    first_block,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE] int64 arena rows, as `addressing.tile_rows`, from what `look_up` gave."""
    entry = start + tl.arange(0, TILE // S) * S
    is_packed = entry < packed_len
    ordinal = first_block + entry // S
    page = tl.where(is_packed, index, index // S).to(tl.int64)
    block = page * LH + tl.where(is_packed, ordinal % LH, lh)
    row = block[:, None] * S + tl.arange(0, S)[None, :]
    return tl.reshape(row, [TILE])
