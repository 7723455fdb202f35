"""Add to the worth of new KVs how unlike the others of its head a key is.

    out[i] = score[i] + unit * unlike[i] / mean(unlike),   unit = weight * mean(score)

Attention of a window says what is asked for; of what it hardly looks at, this keeps
what no other key of the head stands for (`kernels.key_similarity`). Means are over all
resident entries of a request, in all heads, so that one unit buys as much in every
layer.

Only entries that a pass folds get it, and each once: those of a prompt in the pass that
pools them, which also notes the unit; those that were decoded, whose keys are not
looked at, get the unit alone, as if they were of mean unlikeness.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``scores``              [plan.num_entries]     fp32 workspace, layout in `PassPlan`
``unlike``              [plan.num_entries]     fp32 >= 0 of `key_similarity_scores`
``units``               [slots]                fp32, the unit of each request's prompt
======================  =====================  =========================================
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.key_similarity import TINY
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import plan_head, plan_tails_ref


def add_distinct_ref(
    scores: torch.Tensor,
    unlike: torch.Tensor | None,
    units: torch.Tensor,
    plan: PassPlan,
    tables: BlockTables,
    weight: float,
    num_heads_per_page: int,
) -> None:
    """Plain torch form of `add_distinct`; one request at a time."""
    for tail in plan_tails_ref(tables, plan, num_heads_per_page):
        new = tail.starts[:, None] + torch.arange(tail.folded, device=scores.device)
        if not tail.pooled:
            scores[new] += units[tail.slot]
            continue
        assert unlike is not None
        # Padding counts for nothing: it is 0 in both.
        cells = slice(tail.first, int(tail.starts[-1]) + tail.length)
        worth = weight * scores[cells].sum()
        length = unlike[cells].sum().clamp_min(TINY.value)
        units[tail.slot] = worth / tail.entries
        scores[new] += worth / length * unlike[new]


@triton.jit
def sums_kernel(
    scores,
    unlike,
    sums,
    block_offsets,
    slots,
    seq_lens,
    folds,
    tail_blocks,
    pool_tail,
    entry_base,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x sums the scores and the unlikeness of its head.

    Pointers: scores and unlike [num_entries] fp32; sums [2, R * LH] fp32; plan vectors
    [R] int64.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    _, _, _, _, n, _, base = plan_head(
        block_offsets, slots, seq_lens, folds, tail_blocks, entry_base, r, lh, LH, S
    )
    reach = tl.where(tl.load(pool_tail + r) != 0, n, 0)
    score = tl.zeros([BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    for i in range(0, reach, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        score += tl.load(scores + base + entry, mask=entry < reach, other=0.0)
        length += tl.load(unlike + base + entry, mask=entry < reach, other=0.0)
    tl.store(sums + x, tl.sum(score, 0))
    tl.store(sums + tl.num_programs(0) + x, tl.sum(length, 0))


@triton.jit(do_not_specialize=["weight"])
def add_kernel(
    scores,
    unlike,
    units,
    sums,
    block_offsets,
    slots,
    seq_lens,
    folds,
    tail_blocks,
    fold_blocks,
    pool_tail,
    entry_base,
    weight,
    LH: tl.constexpr,
    LHP: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH, P): program (x, y) adds to blocks y, y + P, ... of the new entries
    of its head. Pointers as in `sums_kernel`; units [slots] fp32.

    Where a prompt is pooled, every program merges the sums of its request's heads in
    the same order, and one notes the unit; elsewhere neither they nor `unlike` is read.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, _, _, packed_len, n, _, base = plan_head(
        block_offsets, slots, seq_lens, folds, tail_blocks, entry_base, r, lh, LH, S
    )
    pooled = tl.load(pool_tail + r) != 0
    h = tl.arange(0, LHP)
    inside = (h < LH) & pooled
    own = sums + r * LH + h
    worth = weight * tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    own += tl.num_programs(0)
    length = tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    scale = worth / tl.maximum(length, TINY)
    unit = tl.load(units + slot, mask=pooled == 0, other=0.0)
    if pooled & (lh == 0) & (tl.program_id(1) == 0):
        packed = tl.load(block_offsets + slot * (LH + 1) + LH) * S
        tl.store(units + slot, worth / (packed + LH * (n - packed_len)))

    first = scores + base + packed_len
    more = tl.load(fold_blocks + r).to(tl.int32) * S
    for i in range(tl.program_id(1) * BLOCK, more, tl.num_programs(1) * BLOCK):
        entry = i + tl.arange(0, BLOCK)
        new = entry < more
        far = tl.load(unlike + base + packed_len + entry, mask=new & pooled, other=0.0)
        score = tl.load(first + entry, mask=new, other=0.0)
        tl.store(first + entry, score + unit + scale * far, mask=new)


def add_distinct_triton(
    scores: torch.Tensor,
    unlike: torch.Tensor | None,
    units: torch.Tensor,
    plan: PassPlan,
    tables: BlockTables,
    weight: float,
    num_heads_per_page: int,
) -> None:
    """Triton form of `add_distinct`; one launch, two where a prompt is pooled."""
    block, rows = 1024, plan.slots.shape[0] * num_heads_per_page
    axes = {"LH": num_heads_per_page, "S": PAGE_SIZE, "BLOCK": block, "num_warps": 4}
    sums = torch.empty(2 * rows, dtype=torch.float32, device=scores.device)
    where = (tables.block_offsets, plan.slots, plan.seq_lens, plan.fold_old)
    if unlike is not None:
        sums_kernel[(rows,)](
            scores,
            unlike,
            sums,
            *where,
            plan.tail_blocks,
            plan.pool_tail,
            plan.entry_base,
            **axes,
        )
    add_kernel[(rows, -(-plan.max_blocks * PAGE_SIZE // block))](
        scores,
        scores if unlike is None else unlike,
        units,
        sums,
        *where,
        plan.tail_blocks,
        plan.fold_blocks,
        plan.pool_tail,
        plan.entry_base,
        weight,
        LHP=triton.next_power_of_2(num_heads_per_page),
        **axes,
    )


def add_distinct(
    scores: torch.Tensor,
    unlike: torch.Tensor | None,
    units: torch.Tensor,
    plan: PassPlan,
    tables: BlockTables,
    weight: float,
    num_heads_per_page: int,
) -> None:
    """Add to the scores of what a pass folds, in place.

    Parameters
    ----------
    scores : [plan.num_entries] fp32 >= 0, pooled; 0 at positions >= seq_len.
    unlike : [plan.num_entries] fp32 from `key_similarity_scores`; may be None where no
        request of the plan is pooled.
    units : [slots] fp32, written for requests that are pooled, read for others.
    plan, tables : as they were when the scores were made; only read.
    weight : > 0, a unit as a multiple of the mean score.
    num_heads_per_page : L * H.

    Raises
    ------
    ValueError : a request is pooled and `unlike` is missing.
    """
    if unlike is None and plan.any_pooled:
        raise ValueError("a pass that pools a prompt needs the unlikeness of its keys")
    op = add_distinct_triton if use_triton(scores) else add_distinct_ref
    op(scores, unlike, units, plan, tables, weight, num_heads_per_page)
