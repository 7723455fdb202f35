"""Move survivors into packed pages and publish them in the tables.

Kept entry m of a plan goes to page dest_pages[m // (S * L * H)], block slot
(m // S) % (L * H), offset m % S: blocks in (head, ordinal) order, densely. Pages are
fresh, so sources and destinations never overlap. Moves are bit-exact.

======================  ==========================  =====================================
tensor                  shape                       meaning
======================  ==========================  =====================================
``source_rows``         [plan.num_kept] int64       arena row of each survivor
``dest_pages``          [num_kept // (S*L*H)]       int64 page ids, in keep_base order
======================  ==========================  =====================================
"""

import torch

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.select import SelectedEntries


def pack_entries_ref(
    arena: Arena,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
    plan: PassPlan,
) -> None:
    """Plain torch form of `pack_entries`."""
    heads_per_page = arena.heads_per_page
    entry = torch.arange(plan.num_kept, device=dest_pages.device)
    block = entry // PAGE_SIZE
    block = dest_pages[block // heads_per_page] * heads_per_page + block % heads_per_page
    dest = block * PAGE_SIZE + entry % PAGE_SIZE
    source = selected.source_rows
    for cells in (arena.k.view(-1, arena.head_dim), arena.v.view(-1, arena.head_dim)):
        cells[dest] = cells[source]
    arena.score.view(-1)[dest] = selected.scores


def commit_tables_ref(
    tables: BlockTables,
    arena: Arena,
    selected: SelectedEntries,
    plan: PassPlan,
    dest_pages: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Plain torch form of `commit_tables`."""
    heads_per_page = arena.heads_per_page
    columns = (
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.fold_new,
        plan.tail_blocks,
        plan.entry_base,
        plan.keep_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    for r, (slot, seq_len, fold_old, fold_new, tail, base, keep) in enumerate(requests):
        # Entries are found through the old tables: annotate first, publish after.
        rows, valid, positions, _ = head_rows_ref(
            tables, slot, fold_old, seq_len, heads_per_page
        )
        annotate = valid & (positions >= fold_new)
        lh = torch.arange(heads_per_page, device=rows.device)
        head_base = tables.block_offsets[slot, :heads_per_page].long() + lh * tail
        index = base + PAGE_SIZE * head_base[:, None]
        index = index + torch.arange(rows.shape[1], device=rows.device)
        arena.score.view(-1)[rows[annotate]] = scores[index[annotate]]

        offsets = selected.block_offsets[r]
        first_page = keep // (PAGE_SIZE * heads_per_page)
        num_pages = int(offsets[-1]) // heads_per_page
        tables.block_offsets[slot] = offsets
        tables.fold_lens[slot] = fold_new
        tables.packed_pages[slot, :num_pages] = dest_pages[
            first_page : first_page + num_pages
        ].to(tables.packed_pages.dtype)


def pack_entries(
    arena: Arena,
    selected: SelectedEntries,
    dest_pages: torch.Tensor,
    plan: PassPlan,
) -> None:
    """Copy the survivors' K, V and score into their packed blocks."""
    assert not use_triton(dest_pages)
    pack_entries_ref(arena, selected, dest_pages, plan)


def commit_tables(
    tables: BlockTables,
    arena: Arena,
    selected: SelectedEntries,
    plan: PassPlan,
    dest_pages: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Make the packed blocks of every request of the plan its state."""
    assert not use_triton(scores)
    commit_tables_ref(tables, arena, selected, plan, dest_pages, scores)
