"""Triton kernels of `select_entries`: selection by counting, without any sort.

The bits of a non-negative fp32, read as int32, order like the number. A threshold is
found from its highest 8 bits down: count the entries that agree with the digits chosen
so far by their next digit, choose the digit in which the threshold lies, repeat; four
rounds fix all bits. The price of a head's k-th block is its (S * k + S - 1)-th score,
so a head with c scores up to u has c // S blocks priced up to u, at most `cap`: what it
holds beyond its floor, or what another selection lets it lose.

Heads compete inside their *group*: LH // GROUPS consecutive heads of a request. One
program handles x = r * LH + lh, a head of a request, or y = r * GROUPS + g, a group.
"""

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
DIGITS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)


@triton.jit
def ordered_bits(score, entry, n, sinks, protected):
    """Sort keys of a head's entries: score bits, +inf where the entry is forced.

    Anything but a positive number counts as 0, so that the keys have no sign bit.
    """
    bits = tl.where(score > 0, score, 0.0).to(tl.int32, bitcast=True)
    return tl.where((entry < sinks) | (entry >= n - protected), INF_BITS, bits)


@triton.jit
def count_digits(scores, n, sinks, protected, prefix, shift, BLOCK: tl.constexpr):
    """Count, by their digit at `shift`, the n entries whose higher digits are
    `prefix`'s. `scores` points at the head's first entry. Returns [DIGITS] int32.
    """
    counts = tl.zeros([DIGITS], tl.int32)
    for i in range(0, n, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        score = tl.load(scores + entry, mask=entry < n, other=0.0)
        # Two shifts: one by 32 would be undefined in the first round.
        key = ordered_bits(score, entry, n, sinks, protected) >> shift
        candidate = (entry < n) & (key >> 8 == (prefix >> shift) >> 8)
        counts += tl.histogram(key & (DIGITS - 1), DIGITS, mask=candidate)
    return counts


@triton.jit
def _choose(priced, wanted):
    """The first digit up to which there are `wanted` prices.

    Only an impossible plan asks for more prices than there are.
    """
    return tl.minimum(tl.sum((priced < wanted).to(tl.int32), 0), DIGITS - 1)


@triton.jit
def _blocks_priced(entries, cap, S: tl.constexpr):
    """Blocks with a price, of a head with so many entries up to it."""
    return tl.minimum(entries // S, cap)


@triton.jit
def blocks_to_lose(caps, head, blocks, floor_blocks, mask):
    """Most blocks that heads `head` of [R * LH], which hold `blocks`, may lose: what
    `caps` say, or without them what lies above the floor. 0 in lanes not in `mask`.
    """
    if caps is not None:
        cap = tl.load(caps + head, mask=mask, other=0)
    else:
        cap = tl.where(mask, tl.maximum(blocks - floor_blocks, 0), 0)
    return cap


@triton.jit(do_not_specialize=["shift", "sinks", "floor_blocks"])
def count_kernel(
    block_offsets,
    slots,
    tail_blocks,
    fold_blocks,
    protected,
    entry_base,
    evict_blocks,
    scores,
    scratch,
    priced,
    caps,
    shift,
    sinks,
    floor_blocks,
    LH: tl.constexpr,
    GROUPS: tl.constexpr,
    S: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x counts its head's digits at `shift` and adds the blocks
    that they price to its group's sum.

    Pointers: block_offsets [slots, LH + 1] int32; plan vectors [R] int64; scores
    [num_entries] fp32; scratch a `SelectScratch`; priced [ROUNDS, R * GROUPS, DIGITS]
    int32, 0 before the first round; caps [R * LH] int32 or None. Each round first takes
    in the one before (FIRST: there is none): every program of a group finds the same
    digit. Sums of integers do not depend on the order in which programs add.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    digit = tl.arange(0, DIGITS)
    num_groups = tl.num_programs(0) // LH * GROUPS
    group = r * GROUPS + lh // (LH // GROUPS)
    head = block_offsets + tl.load(slots + r) * (LH + 1) + lh
    first_block = tl.load(head)
    held = tl.load(head + 1) - first_block
    blocks = held + tl.load(fold_blocks + r).to(tl.int32)
    base = tl.load(entry_base + r) + (first_block + lh * tl.load(tail_blocks + r)) * S
    own = scratch.histogram + x.to(tl.int64) * DIGITS + digit
    sums = priced + ((ROUNDS - 1 - shift // 8) * num_groups + group) * DIGITS + digit

    chosen = 0
    lower = 0
    if not FIRST:
        wanted = (tl.load(evict_blocks + r) // GROUPS).to(tl.int32)
        choice = _choose(tl.load(sums - num_groups * DIGITS), wanted)
        lower = tl.load(scratch.below + x)
        lower += tl.sum(tl.where(digit < choice, tl.load(own), 0), 0)
        chosen = tl.load(scratch.prefix + x) | (choice << (shift + 8))
    counts = count_digits(
        scores + base,
        blocks * S,
        sinks,
        tl.load(protected + r).to(tl.int32),
        chosen,
        shift,
        BLOCK,
    )
    # The counts of the round before were read above, by all threads.
    tl.debug_barrier()
    tl.store(own, counts)
    tl.store(scratch.prefix + x, chosen)
    tl.store(scratch.below + x, lower)
    cap = blocks_to_lose(caps, x, blocks, floor_blocks, True)
    blocks_priced = _blocks_priced(lower + tl.cumsum(counts, 0), cap, S)
    tl.atomic_add(sums, blocks_priced, sem="relaxed")


@triton.jit(do_not_specialize=["floor_blocks"])
def deal_kernel(
    block_offsets,
    slots,
    fold_blocks,
    evict_blocks,
    scratch,
    priced,
    caps,
    new_offsets,
    floor_blocks,
    LH: tl.constexpr,
    GROUPS: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * GROUPS): program y turns the counts of the last round into evicted
    blocks a head and block offsets.

    Every block priced below the threshold goes; blocks at the threshold go in head
    order until the group has lost its share. Pointers: as in `count_kernel`;
    new_offsets [R, LH + 1] int32, which like scratch.evicted is written in full.
    """
    HEADS: tl.constexpr = LH // GROUPS
    y = tl.program_id(0)
    r = y // GROUPS
    first_lh = y % GROUPS * HEADS
    first = r.to(tl.int64) * LH + first_lh
    offsets = block_offsets + tl.load(slots + r) * (LH + 1)
    fold = tl.load(fold_blocks + r).to(tl.int32)
    wanted = (tl.load(evict_blocks + r) // GROUPS).to(tl.int32)
    digit = tl.arange(0, DIGITS)
    last_round = (ROUNDS - 1) * tl.num_programs(0)
    choice = _choose(tl.load(priced + (last_round + y) * DIGITS + digit), wanted)

    missing = wanted
    for i in range(0, HEADS, BLOCK):
        j = i + tl.arange(0, BLOCK)
        mask = j < HEADS
        counts = tl.load(
            scratch.histogram + (first + j)[:, None] * DIGITS + digit[None, :],
            mask=mask[:, None] & (digit < choice)[None, :],
            other=0,
        )
        lower = tl.load(scratch.below + first + j, mask=mask, other=0)
        lower += tl.sum(counts, 1)
        tl.store(scratch.below + first + j, lower, mask=mask)
        held = tl.load(offsets + first_lh + j + 1, mask=mask, other=0)
        held -= tl.load(offsets + first_lh + j, mask=mask, other=0)
        cap = blocks_to_lose(caps, first + j, held + fold, floor_blocks, mask)
        missing -= tl.sum(_blocks_priced(lower, cap, S), 0)
    tl.debug_barrier()

    # All groups before this one have kept what they held, less their own share.
    kept_before = tl.load(offsets + first_lh) + fold * first_lh - y % GROUPS * wanted
    out = new_offsets + r.to(tl.int64) * (LH + 1)
    if first_lh == 0:
        tl.store(out, 0)
    for i in range(0, HEADS, BLOCK):
        j = i + tl.arange(0, BLOCK)
        mask = j < HEADS
        lower = tl.load(scratch.below + first + j, mask=mask, other=0)
        same = scratch.histogram + (first + j) * DIGITS + choice
        same = tl.load(same, mask=mask, other=0)
        held = tl.load(offsets + first_lh + j + 1, mask=mask, other=0)
        held -= tl.load(offsets + first_lh + j, mask=mask, other=0)
        cap = blocks_to_lose(caps, first + j, held + fold, floor_blocks, mask)
        cheaper = _blocks_priced(lower, cap, S)
        tied = _blocks_priced(lower + same, cap, S) - cheaper
        share = missing - (tl.cumsum(tied, 0) - tied)
        gone = cheaper + tl.minimum(tl.maximum(share, 0), tied)
        tl.store(scratch.evicted + first + j, gone, mask=mask)
        kept = tl.where(mask, held + fold - gone, 0)
        total = kept_before + tl.cumsum(kept, 0)
        tl.store(out + first_lh + j + 1, total, mask=mask)
        kept_before += tl.sum(kept, 0)
        missing -= tl.sum(tied, 0)
