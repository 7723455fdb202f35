"""Walk the heads of a pass plan: what the ops share that score every resident entry.

`plan_heads_ref`, `plan_tails_ref` and `head_cells_ref` for the references (no padding),
`head_walk`, `plan_head`, `head_pages` and `load_rows` for the Triton kernels. Both
restate the workspace layout of `layout.PassPlan`: a head's cells are its packed
entries, its tail, then padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.kv_dtype import widen
from sglang_kvc.kernels.layout import (
    PAGE_SIZE,
    BlockTables,
    PassPlan,
    PlannedRequest,
)


class PlanHead(NamedTuple):
    """One head of one request of a plan.

    Attributes
    ----------
    request : the plan's numbers.
    lh : layer * H + head.
    rows : [n] int64, arena row of each entry.
    cells : where the entries lie in the workspace; padding is left out.
    """

    request: PlannedRequest
    lh: int
    rows: torch.Tensor
    cells: slice


def plan_heads_ref(tables: BlockTables, plan: PassPlan) -> Iterator[PlanHead]:
    """Yield every head of every request of `plan`, in workspace order."""
    for request in plan.requests():
        rows, valid, _, _ = head_rows_ref(
            tables, request.slot, request.fold_old, request.seq_len
        )
        for lh, first in enumerate(head_cells_ref(tables, request).tolist()):
            own = rows[lh, valid[lh]]
            yield PlanHead(request, lh, own, slice(first, first + own.shape[0]))


class PlanTail(NamedTuple):
    """The tails of one request of a plan: what follows its packed entries.

    Attributes
    ----------
    request : the plan's numbers.
    starts : [heads] int64, where the tail of each head begins.
    entries : of the request, packed ones included, over all heads.
    """

    request: PlannedRequest
    starts: torch.Tensor
    entries: int


def plan_tails_ref(tables: BlockTables, plan: PassPlan) -> Iterator[PlanTail]:
    """Yield the tails of every request of `plan`: all heads have equally long ones."""
    for request in plan.requests():
        offsets = tables.block_offsets[request.slot].long()
        starts = head_cells_ref(tables, request) + PAGE_SIZE * offsets.diff()
        entries = PAGE_SIZE * int(offsets[-1])
        entries += tables.heads_per_page * request.tail_len
        yield PlanTail(request, starts, entries)


def head_cells_ref(tables: BlockTables, request: PlannedRequest) -> torch.Tensor:
    """[heads] int64: where in the workspace each head of a request begins."""
    offsets = tables.block_offsets[request.slot, :-1].long()
    lh = torch.arange(tables.heads_per_page, device=offsets.device)
    return request.entry_base + PAGE_SIZE * (offsets + lh * request.tail_blocks)


class HeadWalk(NamedTuple):
    """Where the entries of a plan's heads lie: one argument of a Triton kernel.

    Tensors only, tables as in ``layout`` and vectors [R] int64 of the plan. Integers
    that vary stay outside: ``do_not_specialize`` does not reach into a tuple.
    """

    req_to_token: torch.Tensor
    block_offsets: torch.Tensor
    packed_pages: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    folds: torch.Tensor
    tail_blocks: torch.Tensor
    entry_base: torch.Tensor


def head_walk(tables: BlockTables, plan: PassPlan) -> HeadWalk:
    """Make the `HeadWalk` of a plan, which `plan_head` and `head_pages` read."""
    return HeadWalk(
        req_to_token=tables.req_to_token,
        block_offsets=tables.block_offsets,
        packed_pages=tables.packed_pages,
        slots=plan.slots,
        seq_lens=plan.seq_lens,
        folds=plan.fold_old,
        tail_blocks=plan.tail_blocks,
        entry_base=plan.entry_base,
    )


# Partial results of a launch, fp32 values: 32 MiB, if one request needs no more. A
# server sets PARTIAL_BYTES aside for them.
MAX_PARTIAL, PARTIAL_BYTES = 8 << 20, 48 << 20
MAX_SPLITS = 64


def programs_per_head(rows: int, work_items: int) -> int:
    """Number of programs a head, so that `rows` heads fill the GPU: a power of two."""
    programs = triton.next_power_of_2(-(-2048 // rows))
    return max(1, min(programs, triton.next_power_of_2(work_items)))


class Splits(NamedTuple):
    """Numbers of a launch whose heads are split over programs.

    Attributes
    ----------
    programs : a head, at most MAX_SPLITS.
    requests : a launch, so that its partial results stay below MAX_PARTIAL.
    """

    programs: int
    requests: int


def split_heads(plan: PassPlan, heads: int, *, entries: int, values: int) -> Splits:
    """Split the heads of `plan`, `heads` a request, over programs.

    Parameters
    ----------
    entries : of a head that are worth a program.
    values : fp32 values that a program leaves for the others.
    """
    num_requests = plan.slots.shape[0]
    work_items = -(-plan.max_blocks * PAGE_SIZE // entries)
    programs = min(programs_per_head(num_requests * heads, work_items), MAX_SPLITS)
    fit = MAX_PARTIAL // (heads * programs * values)
    return Splits(programs, max(1, min(num_requests, fit)))


@triton.jit
def plan_head(walk, r, lh, LH: tl.constexpr, S: tl.constexpr):
    """Locate head `lh` of the plan's request `r`; `walk` is a `HeadWalk`.

    Returns slot, fold_len, first_block (its first packed block), packed_len (packed
    entries), n (entries), size (cells, padding included) and its first cell.
    """
    slot = tl.load(walk.slots + r)
    fold_len = tl.load(walk.folds + r).to(tl.int32)
    tail = tl.load(walk.tail_blocks + r)
    first_block = tl.load(walk.block_offsets + slot * (LH + 1) + lh)
    last_block = tl.load(walk.block_offsets + slot * (LH + 1) + lh + 1)
    packed_len = (last_block - first_block) * S
    n = packed_len + tl.load(walk.seq_lens + r).to(tl.int32) - fold_len
    size = packed_len + tail.to(tl.int32) * S
    first_cell = tl.load(walk.entry_base + r) + (first_block + lh * tail) * S
    return slot, fold_len, first_block, packed_len, n, size, first_cell


@triton.jit
def head_pages(walk, slot, fold_len, packed_len, token_table_stride, page_table_stride):
    """Point at what `tile_rows` reads of a request: packed pages, its tail's tokens."""
    tokens = walk.req_to_token + slot * token_table_stride + fold_len - packed_len
    return walk.packed_pages + slot * page_table_stride, tokens


@triton.jit
def load_rows(cells, arena_row, valid, D: tl.constexpr, DP: tl.constexpr):
    """[entries, DP] fp32 rows of the arena's K or V, without their scale; 0 in lanes
    that are not valid.
    """
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < D)[None, :]
    tile = tl.load(cells + arena_row[:, None] * D + d[None, :], mask=mask, other=0.0)
    return widen(tile, tl.float32).to(tl.float32)
