"""Move survivors into packed pages and publish them in the tables.

Kept entry m of a plan goes to page dest_pages[m // (S * L * H)], block slot
(m // S) % (L * H), offset m % S: blocks in (head, ordinal) order, densely. Pages are
fresh, so sources and destinations never overlap. Moves are bit-exact.

======================  ==========================  ====================================
tensor                  shape                       meaning
======================  ==========================  ====================================
``source_rows``         [plan.num_kept] int32       arena row of each survivor
``dest_pages``          [num_kept // (S*L*H)]       int64 page ids, in keep_base order
======================  ==========================  ====================================
"""

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.kv_dtype import stored_bytes
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.pack_kernels import (
    annotate_kernel,
    pack_kernel,
    publish_kernel,
)
from sglang_kvc.kernels.plan_heads import head_cells_ref
from sglang_kvc.kernels.select import SelectedEntries


def pack_entries_ref(
    arena: Arena,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
) -> None:
    """Plain torch form of `pack_entries`."""
    heads_per_page = arena.heads_per_page
    entry = torch.arange(plan.num_kept, device=dest_pages.device)
    block = entry // PAGE_SIZE
    page, in_page = dest_pages[block // heads_per_page], block % heads_per_page
    dest = (page * heads_per_page + in_page) * PAGE_SIZE + entry % PAGE_SIZE
    source = selected.source_rows.long()
    for part in arena[:2]:
        cells = stored_bytes(part).view(-1, arena.head_dim)
        cells[dest] = cells[source]
    arena.score.view(-1)[dest] = selected.scores


def commit_tables_ref(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Plain torch form of `commit_tables`."""
    heads_per_page = arena.heads_per_page
    for request, offsets in zip(plan.requests(), selected.block_offsets, strict=True):
        slot = request.slot
        # Entries are found through the old tables: annotate first, publish after.
        rows, valid, positions, _ = head_rows_ref(
            tables, slot, request.fold_old, request.seq_len
        )
        annotate = valid & (positions >= request.fold_new)
        entry = torch.arange(rows.shape[1], device=rows.device)
        index = head_cells_ref(tables, request)[:, None] + entry
        arena.score.view(-1)[rows[annotate]] = scores[index[annotate]]

        first_page = request.keep_base // (PAGE_SIZE * heads_per_page)
        num_pages = int(offsets[-1]) // heads_per_page
        tables.block_offsets[slot] = offsets
        tables.fold_lens[slot] = request.fold_new
        tables.packed_pages[slot, :num_pages] = dest_pages[
            first_page : first_page + num_pages
        ].to(tables.packed_pages.dtype)


def pack_entries_triton(
    arena: Arena,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
) -> None:
    """Triton form of `pack_entries`."""
    if plan.num_kept == 0:
        return
    block = 4 * PAGE_SIZE
    pack_kernel[(-(-plan.num_kept // block),)](
        stored_bytes(arena.k),
        stored_bytes(arena.v),
        arena.score,
        selected.source_rows,
        selected.scores,
        dest_pages,
        plan.num_kept,
        LH=arena.heads_per_page,
        S=PAGE_SIZE,
        D=arena.head_dim,
        DP=triton.next_power_of_2(arena.head_dim),
        BLOCK=block,
        num_warps=4,
    )


def commit_tables_triton(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Triton form of `commit_tables`: annotate through the old tables, then publish."""
    num_requests, heads = plan.slots.shape[0], arena.heads_per_page
    annotate_kernel[(num_requests * heads,)](
        arena.score,
        scores,
        tables.req_to_token,
        tables.block_offsets,
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.fold_new,
        plan.tail_blocks,
        plan.entry_base,
        tables.req_to_token.stride(0),
        LH=heads,
        S=PAGE_SIZE,
        BLOCK=32,
        num_warps=1,
    )
    publish_kernel[(num_requests,)](
        tables.fold_lens,
        tables.block_offsets,
        tables.packed_pages,
        plan.slots,
        plan.fold_new,
        plan.keep_base,
        selected.block_offsets,
        dest_pages,
        tables.packed_pages.stride(0),
        LH=heads,
        S=PAGE_SIZE,
        BLOCK=256,
        num_warps=4,
    )


def pack_entries(
    arena: Arena,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
) -> None:
    """Copy the survivors' K, V and score into their packed blocks.

    Parameters
    ----------
    arena : written in place, in pages `dest_pages` only.
    plan : only read.
    selected : from `select_entries`.
    dest_pages : [plan.num_kept // (S * L * H)] int64, page ids that nobody else uses.
    """
    op = pack_entries_triton if use_triton(dest_pages) else pack_entries_ref
    op(arena, plan, selected, dest_pages)


def commit_tables(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Make the packed blocks the state of every request of the plan.

    Parameters
    ----------
    arena : ``score`` of the positions fold_new .. seq_len - 1 is set from `scores`;
        positions below fold_new, which may be shared with the prefix tree, are not.
    tables : ``block_offsets``, ``fold_lens`` and the used part of ``packed_pages`` are
        overwritten in the rows of the plan's slots.
    plan, selected, dest_pages : as given to `pack_entries`.
    scores : [plan.num_entries] fp32 that `select_entries` chose by.
    """
    op = commit_tables_triton if use_triton(scores) else commit_tables_ref
    op(arena, tables, plan, selected, dest_pages, scores)
