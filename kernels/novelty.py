"""Raise the scores of new KVs by how novel their keys are among those of their head.

    out[i] = score[i] + unit * diffs[i] / mean(diffs),   unit = weight * mean(score)

Attention of a window says what is asked for; of what it hardly looks at, this keeps
what no other key of the head stands for (`kernels.key_diff`). Means are over all
resident entries of a request, in all heads, so that one unit buys as much in every
layer.

Only entries that a pass folds get it, and each once: those of a prompt in the pass that
pools them, which also notes the unit; those that were decoded, whose keys are not
looked at, get the unit alone, as if they were of mean novelty.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``scores``              [plan.num_entries]     fp32 workspace, layout in `PassPlan`
``diffs``               [plan.num_entries]     fp32 >= 0 of `key_diff`
``novelty_unit``        [slots]                fp32, the unit of each request's prompt
======================  =====================  =========================================
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.key_diff import TINY
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import head_walk, plan_head, plan_tails_ref


def add_novelty_ref(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    diffs: torch.Tensor | None,
    novelty_unit: torch.Tensor,
    *,
    weight: float,
) -> None:
    """Plain torch form of `add_novelty`; one request at a time."""
    for request, starts, entries in plan_tails_ref(tables, plan):
        folded = request.fold_new - request.fold_old
        new = starts[:, None] + torch.arange(folded, device=scores.device)
        if not request.pool_tail:
            scores[new] += novelty_unit[request.slot]
            continue
        assert diffs is not None
        # Padding counts for nothing: it is 0 in both.
        cells = slice(request.entry_base, int(starts[-1]) + request.tail_len)
        worth = weight * scores[cells].sum()
        length = diffs[cells].sum().clamp_min(TINY.value)
        novelty_unit[request.slot] = worth / entries
        scores[new] += worth / length * diffs[new]


@triton.jit
def sums_kernel(
    walk,
    pool_tail,
    scores,
    diffs,
    sums,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH): program x sums the scores and the differences of its head.

    Pointers: walk a `HeadWalk`; pool_tail [R] int64; scores and diffs [num_entries]
    fp32; sums [2, R * LH] fp32.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    _, _, _, _, n, _, base = plan_head(walk, r, lh, LH, S)
    reach = tl.where(tl.load(pool_tail + r) != 0, n, 0)
    score = tl.zeros([BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    for i in range(0, reach, BLOCK):
        entry = i + tl.arange(0, BLOCK)
        score += tl.load(scores + base + entry, mask=entry < reach, other=0.0)
        length += tl.load(diffs + base + entry, mask=entry < reach, other=0.0)
    tl.store(sums + x, tl.sum(score, 0))
    tl.store(sums + tl.num_programs(0) + x, tl.sum(length, 0))


@triton.jit(do_not_specialize=["weight"])
def add_kernel(
    walk,
    fold_blocks,
    pool_tail,
    scores,
    diffs,
    novelty_unit,
    sums,
    weight,
    LH: tl.constexpr,
    LHP: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (R * LH, P): program (x, y) adds to blocks y, y + P, ... of the new entries
    of its head. Pointers as in `sums_kernel`; fold_blocks [R] int64; novelty_unit
    [slots] fp32.

    Where a prompt is pooled, every program merges the sums of its request's heads in
    the same order, and one notes the unit; elsewhere neither they nor `diffs` is read.
    """
    x = tl.program_id(0)
    r = x // LH
    lh = x % LH
    slot, _, _, packed_len, n, _, base = plan_head(walk, r, lh, LH, S)
    pooled = tl.load(pool_tail + r) != 0
    h = tl.arange(0, LHP)
    inside = (h < LH) & pooled
    own = sums + r * LH + h
    worth = weight * tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    own += tl.num_programs(0)
    length = tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    scale = worth / tl.maximum(length, TINY)
    unit = tl.load(novelty_unit + slot, mask=pooled == 0, other=0.0)
    if pooled & (lh == 0) & (tl.program_id(1) == 0):
        packed = tl.load(walk.block_offsets + slot * (LH + 1) + LH) * S
        tl.store(novelty_unit + slot, worth / (packed + LH * (n - packed_len)))

    first = scores + base + packed_len
    more = tl.load(fold_blocks + r).to(tl.int32) * S
    for i in range(tl.program_id(1) * BLOCK, more, tl.num_programs(1) * BLOCK):
        entry = i + tl.arange(0, BLOCK)
        new = entry < more
        far = tl.load(diffs + base + packed_len + entry, mask=new & pooled, other=0.0)
        score = tl.load(first + entry, mask=new, other=0.0)
        tl.store(first + entry, score + unit + scale * far, mask=new)


def add_novelty_triton(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    diffs: torch.Tensor | None,
    novelty_unit: torch.Tensor,
    *,
    weight: float,
) -> None:
    """Triton form of `add_novelty`; one launch, two where a prompt is pooled."""
    block, heads = 1024, tables.heads_per_page
    rows = plan.slots.shape[0] * heads
    axes = {"LH": heads, "S": PAGE_SIZE, "BLOCK": block, "num_warps": 4}
    sums = torch.empty(2 * rows, dtype=torch.float32, device=scores.device)
    walk = head_walk(tables, plan)
    if diffs is not None:
        sums_kernel[(rows,)](
            walk,
            plan.pool_tail,
            scores,
            diffs,
            sums,
            **axes,
        )
    add_kernel[(rows, -(-plan.max_blocks * PAGE_SIZE // block))](
        walk,
        plan.fold_blocks,
        plan.pool_tail,
        scores,
        scores if diffs is None else diffs,
        novelty_unit,
        sums,
        weight,
        LHP=triton.next_power_of_2(heads),
        **axes,
    )


def add_novelty(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    diffs: torch.Tensor | None,
    novelty_unit: torch.Tensor,
    *,
    weight: float,
) -> None:
    """Raise the scores of what a pass folds, in place.

    Parameters
    ----------
    tables, plan : as they were when the scores were made; only read.
    scores : [plan.num_entries] fp32 >= 0, pooled; 0 at positions >= seq_len.
    diffs : [plan.num_entries] fp32 from `key_diff`; may be None where no
        request of the plan is pooled.
    novelty_unit : [slots] fp32, written for requests that are pooled, read for others.
    weight : > 0, a unit as a multiple of the mean score.

    Raises
    ------
    ValueError : a request is pooled and `diffs` is missing.
    """
    if diffs is None and plan.any_pooled:
        raise ValueError("a pass that pools a prompt needs the differences of its keys")
    op = add_novelty_triton if use_triton(scores) else add_novelty_ref
    op(tables, plan, scores, diffs, novelty_unit, weight=weight)
