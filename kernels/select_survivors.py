"""Triton kernel of `select_entries` that writes down what stays.

What a head loses is known by then (`select_kernels`): its so many lowest entries, found
by the same counting, ties by ordinal.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import entry_rows
from sglang_kvc.kernels.plan_heads import plan_head
from sglang_kvc.kernels.select_kernels import (
    DIGITS,
    ROUNDS,
    count_digits,
    ordered_bits,
)


@triton.jit(do_not_specialize=["sinks"])
def survivors_kernel(
    walk,
    fold_blocks,
    protected,
    keep_base,
    scores,
    evicted,
    selected,
    token_table_stride,
    page_table_stride,
    sinks,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x finds its head's S * evicted[x] lowest entries and
    writes the others, in order, to the head's part of the kept list.

    Pointers: walk a `HeadWalk`; plan vectors [R] int64; scores [num_entries] fp32;
    evicted [R * LH] int32; selected a `SelectedEntries`, of which the block offsets are
    read. Parts of heads are disjoint and filled exactly.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, _, _, base = plan_head(walk, r, lh, LH, S)
    n = packed_len + tl.load(fold_blocks + r).to(tl.int32) * S
    keep_last = tl.load(protected + r).to(tl.int32)
    scores += base

    # The `wanted`-th lowest key and how many keys are below it.
    wanted = tl.load(evicted + x) * S
    digit = tl.arange(0, DIGITS)
    threshold = 0
    below = 0
    if wanted > 0:
        for step in range(ROUNDS):
            shift = 24 - 8 * step
            counts = count_digits(scores, n, sinks, keep_last, threshold, shift, BLOCK)
            reached = below + tl.cumsum(counts, 0)
            choice = tl.sum((reached < wanted).to(tl.int32), 0)
            below += tl.sum(tl.where(digit < choice, counts, 0), 0)
            threshold = threshold | (choice << shift)

    new_block = tl.load(selected.block_offsets + r.to(tl.int64) * (LH + 1) + lh)
    out = tl.load(keep_base + r) + new_block * S
    tokens = walk.req_to_token + slot * token_table_stride
    pages = walk.packed_pages + slot * page_table_stride
    ties_before = 0
    kept_before = 0
    for i in range(0, n, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        valid = entry < n
        score = tl.load(scores + entry, mask=valid, other=0.0)
        key = ordered_bits(score, entry, n, sinks, keep_last)
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
            packed_len,
            fold_len,
            first_block,
            tokens,
            pages,
            LH,
            S,
        )
        tl.store(selected.source_rows + out + rank, row, mask=keep)
        tl.store(selected.scores + out + rank, score, mask=keep)
        ties_before += tl.sum(tie, 0)
        kept_before += tl.sum(kept, 0)
