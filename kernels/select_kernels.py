"""Triton kernels of `select_entries`: selection by counting, without any sort.

The bits of a non-negative fp32, read as int32, order like the number. A threshold is
found from its highest 4 bits down: count the entries that agree with the digits chosen
so far by their next digit, choose the digit in which the threshold lies, repeat; eight
rounds fix all 32 bits. The price of a head's k-th block is its (S * k + S - 1)-th
score, so a head with c scores up to u has c // S blocks priced up to u.

One program handles x = r * L*H + lh, a head of a request, or r, a request.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import entry_rows

INF_BITS = tl.constexpr(0x7F800000)
DIGITS = tl.constexpr(16)


@triton.jit
def _ordered_bits(score, entry, n, sinks, protected):
    """Sort keys of a head's entries: score bits, +inf where the entry is forced.

    Anything but a positive number counts as 0, so that the keys have no sign bit.
    """
    bits = tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)
    return tl.where((entry < sinks) | (entry >= n - protected), INF_BITS, bits)


@triton.jit
def _count_digits(scores, n, sinks, protected, prefix, shift, BLOCK: tl.constexpr):
    """Count, by their digit at `shift`, the n entries whose higher digits are
    `prefix`'s. `scores` points at the head's first entry. Returns [DIGITS] int32.
    """
    digit = tl.arange(0, DIGITS)
    counts = tl.zeros([DIGITS], tl.int32)
    for i in range(0, n, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        score = tl.load(scores + entry, mask=entry < n, other=0.0)
        # Two shifts: one by 32 would be undefined in the first round.
        key = _ordered_bits(score, entry, n, sinks, protected) >> shift
        candidate = (entry < n) & (key >> 4 == (prefix >> shift) >> 4)
        key = tl.where(candidate, key & (DIGITS - 1), DIGITS)
        counts += tl.sum((key[:, None] == digit[None, :]).to(tl.int32), 0)
    return counts


@triton.jit(do_not_specialize=["shift", "sinks"])
def histogram_kernel(
    scores,
    block_offsets,
    slots,
    tail_blocks,
    fold_blocks,
    protected,
    entry_base,
    prefix,
    histogram,
    shift,
    sinks,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x writes histogram[x] [DIGITS] int32 of its head.

    Pointers: scores [num_entries] fp32; block_offsets [slots, LH + 1] int32; plan
    vectors [R] int64; prefix [R] int32.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    head = block_offsets + tl.load(slots + r) * (LH + 1) + lh
    first_block = tl.load(head)
    held = tl.load(head + 1) - first_block
    n = (held + tl.load(fold_blocks + r).to(tl.int32)) * S
    base = tl.load(entry_base + r) + (first_block + lh * tl.load(tail_blocks + r)) * S
    counts = _count_digits(
        scores + base,
        n,
        sinks,
        tl.load(protected + r).to(tl.int32),
        tl.load(prefix + r),
        shift,
        BLOCK,
    )
    tl.store(histogram + x.to(tl.int64) * DIGITS + tl.arange(0, DIGITS), counts)


@triton.jit(do_not_specialize=["shift"])
def pick_digit_kernel(
    histogram,
    evict_blocks,
    prefix,
    below,
    equal,
    shift,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R): program r appends a digit to prefix[r]: the first one up to which the
    heads together have evict_blocks[r] prices.

    Pointers: histogram [R * LH, DIGITS] int32; prefix [R], below and equal [R * LH]
    int32, updated in place: the head's entries below and inside the prefix's range.
    """
    r = tl.program_id(0)
    digit = tl.arange(0, DIGITS)
    first = r.to(tl.int64) * LH
    priced = tl.zeros([DIGITS], tl.int32)
    for i in range(0, LH, BLOCK):
        lh = i + tl.arange(0, BLOCK)
        mask = (lh < LH)[:, None]
        cell = (first + lh)[:, None] * DIGITS + digit[None, :]
        counts = tl.load(histogram + cell, mask=mask, other=0)
        lower = tl.load(below + first + lh, mask=lh < LH, other=0)
        priced += tl.sum((lower[:, None] + tl.cumsum(counts, 1)) // S, 0)
    wanted = tl.load(evict_blocks + r).to(tl.int32)
    # Only an impossible plan asks for more prices than there are.
    choice = tl.minimum(tl.sum((priced < wanted).to(tl.int32), 0), DIGITS - 1)
    for i in range(0, LH, BLOCK):
        lh = i + tl.arange(0, BLOCK)
        mask = (lh < LH)[:, None]
        cell = (first + lh)[:, None] * DIGITS + digit[None, :]
        counts = tl.load(histogram + cell, mask=mask, other=0)
        lower = tl.load(below + first + lh, mask=lh < LH, other=0)
        lower += tl.sum(tl.where(digit[None, :] < choice, counts, 0), 1)
        same = tl.sum(tl.where(digit[None, :] == choice, counts, 0), 1)
        tl.store(below + first + lh, lower, mask=lh < LH)
        tl.store(equal + first + lh, same, mask=lh < LH)
    tl.store(prefix + r, tl.load(prefix + r) | (choice << shift))


@triton.jit
def deal_kernel(
    block_offsets,
    slots,
    fold_blocks,
    evict_blocks,
    below,
    equal,
    evicted,
    new_offsets,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R): program r turns counts into evicted blocks a head and block offsets.

    Every block priced below the threshold goes; blocks at the threshold go in head
    order until evict_blocks[r] are reached. Pointers: evicted [R * LH] and new_offsets
    [R, LH + 1] int32, written in full.
    """
    r = tl.program_id(0)
    first = r.to(tl.int64) * LH
    offsets = block_offsets + tl.load(slots + r) * (LH + 1)
    fold = tl.load(fold_blocks + r).to(tl.int32)
    missing = tl.load(evict_blocks + r).to(tl.int32)
    for i in range(0, LH, BLOCK):
        lh = i + tl.arange(0, BLOCK)
        missing -= tl.sum(tl.load(below + first + lh, mask=lh < LH, other=0) // S, 0)
    kept_before = 0
    out = new_offsets + r.to(tl.int64) * (LH + 1)
    tl.store(out, 0)
    for i in range(0, LH, BLOCK):
        lh = i + tl.arange(0, BLOCK)
        mask = lh < LH
        lower = tl.load(below + first + lh, mask=mask, other=0)
        same = tl.load(equal + first + lh, mask=mask, other=0)
        tied = (lower + same) // S - lower // S
        share = missing - (tl.cumsum(tied, 0) - tied)
        gone = lower // S + tl.minimum(tl.maximum(share, 0), tied)
        tl.store(evicted + first + lh, gone, mask=mask)
        held = tl.load(offsets + lh + 1, mask=mask, other=0)
        held -= tl.load(offsets + lh, mask=mask, other=0)
        kept = tl.where(mask, held + fold - gone, 0)
        tl.store(out + lh + 1, kept_before + tl.cumsum(kept, 0), mask=mask)
        kept_before += tl.sum(kept, 0)
        missing -= tl.sum(tied, 0)


@triton.jit(do_not_specialize=["sinks"])
def survivors_kernel(
    scores,
    req_to_token,
    block_offsets,
    packed_pages,
    slots,
    folds,
    tail_blocks,
    fold_blocks,
    protected,
    entry_base,
    keep_base,
    evicted,
    new_offsets,
    source_rows,
    kept_scores,
    token_table_stride,
    page_table_stride,
    sinks,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x finds its head's S * evicted[x] lowest entries and
    writes the others, in order, to the head's part of the kept list.

    Pointers: tables as in ``layout``; plan vectors [R] int64; source_rows int32 and
    kept_scores fp32 [num_kept]. Parts of heads are disjoint and filled exactly.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot = tl.load(slots + r)
    fold_len = tl.load(folds + r).to(tl.int32)
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    held = tl.load(block_offsets + slot * (LH + 1) + lh + 1) - first_block
    n = (held + tl.load(fold_blocks + r).to(tl.int32)) * S
    keep_last = tl.load(protected + r).to(tl.int32)
    scores += (
        tl.load(entry_base + r) + (first_block + lh * tl.load(tail_blocks + r)) * S
    )

    # The `wanted`-th lowest key and how many keys are below it.
    wanted = tl.load(evicted + x) * S
    digit = tl.arange(0, DIGITS)
    threshold = 0
    below = 0
    if wanted > 0:
        for step in range(8):
            shift = 28 - 4 * step
            counts = _count_digits(scores, n, sinks, keep_last, threshold, shift, BLOCK)
            reached = below + tl.cumsum(counts, 0)
            choice = tl.sum((reached < wanted).to(tl.int32), 0)
            below += tl.sum(tl.where(digit < choice, counts, 0), 0)
            threshold = threshold | (choice << shift)

    new_block = tl.load(new_offsets + r.to(tl.int64) * (LH + 1) + lh)
    out = tl.load(keep_base + r) + new_block * S
    tokens = req_to_token + slot * token_table_stride
    pages = packed_pages + slot * page_table_stride
    ties_before = 0
    kept_before = 0
    for i in range(0, n, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        valid = entry < n
        score = tl.load(scores + entry, mask=valid, other=0.0)
        key = _ordered_bits(score, entry, n, sinks, keep_last)
        tie = (valid & (key == threshold)).to(tl.int32)
        tie_rank = ties_before + tl.cumsum(tie, 0) - tie
        gone = (key < threshold) | ((tie > 0) & (tie_rank < wanted - below))
        keep = valid & (gone == 0)
        kept = keep.to(tl.int32)
        rank = kept_before + tl.cumsum(kept, 0) - kept
        row = entry_rows(
            entry,
            keep,
            lh,
            held * S,
            fold_len,
            first_block,
            tokens,
            pages,
            LH,
            S,
        )
        tl.store(source_rows + out + rank, row, mask=keep)
        tl.store(kept_scores + out + rank, score, mask=keep)
        ties_before += tl.sum(tie, 0)
        kept_before += tl.sum(kept, 0)
