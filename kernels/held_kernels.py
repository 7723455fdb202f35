"""Triton kernels of `follow_positions` and `thousandths`."""

import triton
import triton.language as tl


@triton.jit
def request_row(table, r):
    """Load the row of request `r`, int64; what a kernel does not use is not read.

    slot, fold_old, fold_new, tokens, its first cell of ``holders``, its first survivor,
    survivors, pages packed before the pass, and the addresses of these pages, of the
    positions in them and of those to be written: vectors of its own, of any pass.
    """
    # Names for the cells would be globals, which Triton compares at every launch: with
    # eleven of them it took the host twice as long.
    row = table + r * 11
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
        tl.load(row + 6),
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
        tl.load(row + 10),
    )


@triton.jit
def mark_kernel(
    req_to_token,
    table,
    marks,
    holders,
    token_table_stride,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (cdiv(most pages or tokens, BLOCK), R): what `follow_kernel` starts from.

    Program (x, r) marks pages [x, x + 1) * BLOCK of request r, the packed ones first,
    and sets the counters of as many tokens: 0 below ``fold_new``, LH behind it.

    The mark of a packed page is its ordinal, that of a page of the tail -1 - the
    position where it stands. So pages of the prefix tree, which several requests may
    read, get the same mark from each of them.

    Pointers: table [R, 11] int64, see `request_row`; marks [num_pages] and holders
    [all tokens] int32.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot, fold_old, fold_new, num_tokens, first, _, _, packed, pages_at, _, _ = (
        request_row(table, tl.program_id(1))
    )
    is_packed = i < packed
    position = fold_old + (i - packed) * S
    is_tail = (i >= packed) & (position < fold_new)
    pages = pages_at.to(tl.pointer_type(tl.int64))
    page = tl.load(pages + i, mask=is_packed, other=0)
    tokens = req_to_token + slot * token_table_stride
    token = tl.load(tokens + position, mask=is_tail, other=0).to(tl.int64)
    page = tl.where(is_packed, page, token // S)
    mark = tl.where(is_packed, i, -1 - position)
    tl.store(marks + page, mark.to(tl.int32), mask=is_packed | is_tail)

    held = tl.where(i < fold_new, 0, LH)
    tl.store(holders + first + i, held.to(tl.int32), mask=i < num_tokens)


@triton.jit
def follow_kernel(
    rows,
    table,
    marks,
    holders,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (cdiv(most survivors, BLOCK), R): program (x, r) follows survivors
    [x, x + 1) * BLOCK of request r.

    Pointers: rows [plan.num_kept] int32; the others as `mark_kernel` left them.
    `holders` is counted up atomically.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, num_tokens, first, base, kept, _, _, known_at, positions_at = request_row(
        table, tl.program_id(1)
    )
    ok = m < kept
    row = tl.load(rows + base + m, mask=ok, other=0)
    block = row // S
    mark = tl.load(marks + block // LH, mask=ok, other=0)
    is_packed = mark >= 0
    cell = (mark.to(tl.int64) * LH + block % LH) * S + row % S
    known = known_at.to(tl.pointer_type(tl.int32))
    before = tl.load(known + cell, mask=ok & is_packed, other=0)
    position = tl.where(is_packed, before, -1 - mark + row % S)
    positions = positions_at.to(tl.pointer_type(tl.int32))
    tl.store(positions + m, position, mask=ok)
    counted = ok & (position < num_tokens)
    tl.atomic_add(holders + first + position, 1, mask=counted, sem="relaxed")


# `n` is different in every launch; the others are a server's, but not worth a kernel
# that a warm-up must compile for them.
@triton.jit(do_not_specialize=["n", "ranks", "heads"])
def thousandths_kernel(holders, shares, n, ranks, heads, BLOCK: tl.constexpr):
    """Grid (cdiv(n, BLOCK)): program x converts tokens [x, x + 1) * BLOCK.

    Pointers: holders [n, ranks] int32; shares [n] int16.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < n
    held = tl.zeros([BLOCK], dtype=tl.int32)
    for rank in range(ranks):
        held += tl.load(holders + i * ranks + rank, mask=ok, other=0)
    share = (held * 1000 + heads // 2) // heads
    tl.store(shares + i, share.to(tl.int16), mask=ok)
