"""Walk the heads of a pass plan: what the ops share that score every resident entry.

`plan_heads_ref` and `plan_tails_ref` for the references (no padding), `walk_inputs`,
`plan_head` and `load_rows` for the Triton kernels. Both restate the workspace layout of
`layout.PassPlan`: a head's cells are its packed entries, its tail, then padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan


class PlanHead(NamedTuple):
    """One head of one request of a plan.

    Attributes
    ----------
    slot, seq_len : the request's.
    lh : layer * H + head.
    annotated : whether scores that the arena stores count (no first pass).
    rows : [n] int64, arena row of each entry.
    cells : where the entries lie in the workspace; padding is left out.
    """

    slot: int
    seq_len: int
    lh: int
    annotated: bool
    rows: torch.Tensor
    cells: slice


def plan_heads_ref(
    tables: BlockTables, plan: PassPlan, heads_per_page: int
) -> Iterator[PlanHead]:
    """Yield every head of every request of `plan`, in workspace order."""
    columns = (
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.tail_blocks,
        plan.is_first,
        plan.entry_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    for slot, seq_len, fold, tail_blocks, is_first, base in requests:
        rows, valid, _, _ = head_rows_ref(tables, slot, fold, seq_len, heads_per_page)
        offsets = tables.block_offsets[slot].tolist()
        for lh in range(heads_per_page):
            own = rows[lh, valid[lh]]
            start = base + PAGE_SIZE * (offsets[lh] + lh * tail_blocks)
            cells = slice(start, start + own.shape[0])
            yield PlanHead(slot, seq_len, lh, not is_first, own, cells)


class PlanTail(NamedTuple):
    """The tails of one request of a plan: what follows its packed entries.

    Attributes
    ----------
    slot : the request's.
    pooled : whether they are pooled.
    first : where the request's cells begin.
    starts : [heads] int64, where the tail of each head begins.
    length : entries of each tail; padding is left out.
    folded : of them, those that the pass folds.
    entries : of the request, packed ones included, over all heads.
    """

    slot: int
    pooled: bool
    first: int
    starts: torch.Tensor
    length: int
    folded: int
    entries: int


def plan_tails_ref(
    tables: BlockTables, plan: PassPlan, heads_per_page: int
) -> Iterator[PlanTail]:
    """Yield the tails of every request of `plan`: all heads have equally long ones."""
    columns = (
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.tail_blocks,
        plan.fold_blocks,
        plan.pool_tail,
        plan.entry_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    head = torch.arange(heads_per_page, device=plan.slots.device)
    for slot, seq_len, fold, tail_blocks, fold_blocks, pooled, base in requests:
        offsets = tables.block_offsets[slot, 1 : heads_per_page + 1].long()
        starts = base + PAGE_SIZE * (offsets + head * tail_blocks)
        length = seq_len - fold
        entries = PAGE_SIZE * int(offsets[-1]) + heads_per_page * length
        folded = PAGE_SIZE * fold_blocks
        yield PlanTail(slot, bool(pooled), base, starts, length, folded, entries)


def walk_inputs(tables: BlockTables, plan: PassPlan) -> tuple[torch.Tensor, ...]:
    """What kernels that walk a plan take in a row, from req_to_token to folds."""
    return (
        tables.req_to_token,
        tables.block_offsets,
        tables.packed_pages,
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
    )


def programs_per_head(rows: int, work_items: int) -> int:
    """Programs a head, so that `rows` heads fill the GPU: a power of two."""
    programs = triton.next_power_of_2(-(-2048 // rows))
    return max(1, min(programs, triton.next_power_of_2(work_items)))


@triton.jit
def plan_head(
    block_offsets,
    slots,
    seq_lens,
    folds,
    tail_blocks,
    entry_base,
    r,
    lh,
    LH: tl.constexpr,
    S: tl.constexpr,
):
    """Locate head `lh` of the plan's request `r`; plan vectors [R] int64.

    Returns slot, fold_len, first_block (its first packed block), packed_len (packed
    entries), n (entries), size (cells, padding included) and its first cell.
    """
    slot = tl.load(slots + r)
    fold_len = tl.load(folds + r).to(tl.int32)
    tail = tl.load(tail_blocks + r)
    first_block = tl.load(block_offsets + slot * (LH + 1) + lh)
    last_block = tl.load(block_offsets + slot * (LH + 1) + lh + 1)
    packed_len = (last_block - first_block) * S
    n = packed_len + tl.load(seq_lens + r).to(tl.int32) - fold_len
    size = packed_len + tail.to(tl.int32) * S
    first_cell = tl.load(entry_base + r) + (first_block + lh * tail) * S
    return slot, fold_len, first_block, packed_len, n, size, first_cell


@triton.jit
def load_rows(cells, arena_row, valid, D: tl.constexpr, DP: tl.constexpr):
    """[entries, DP] fp32 rows of the arena's K or V; 0 in lanes that are not valid."""
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < D)[None, :]
    tile = tl.load(cells + arena_row[:, None] * D + d[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32)
