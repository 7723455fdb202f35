"""Choose the KVs that survive: Algorithm 1 of KV-Compress, without its hanging blocks.

All heads of a request compete with the n_h = S * (packed + fold) blocks that they hold.
With a_h the ascending scores of head h, freeing its k-th block costs
price_h[k] = a_h[S * k + S - 1]. The E cheapest blocks over all heads go, ties by
(head, k); a head that loses e_h blocks loses its S * e_h lowest entries, ties by
ordinal. Survivors keep their order. Sinks and protected entries count as +inf.

======================  =====================  ==========================================
tensor                  shape                  meaning
======================  =====================  ==========================================
``scores``              [plan.num_entries]     fp32 >= 0, layout in `PassPlan`
``source_rows``         [plan.num_kept] int64  arena row of each survivor
``kept_scores``         [plan.num_kept] fp32   its score
``block_offsets``       [R, L*H + 1] int32     exclusive prefix sum of n_h / S - e_h
======================  =====================  ==========================================
"""

from typing import NamedTuple

import torch

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan


class SelectedEntries(NamedTuple):
    """The survivors of a plan, packed: entry ``keep_base[r] + S * block_offsets[r, lh]
    + rank`` is the rank-th survivor of head lh; shapes in the module docstring.
    """

    source_rows: torch.Tensor
    scores: torch.Tensor
    block_offsets: torch.Tensor


def select_entries_ref(
    scores: torch.Tensor,
    arena_heads: int,
    tables: BlockTables,
    plan: PassPlan,
    sinks: int,
) -> SelectedEntries:
    """Plain torch form of `select_entries`; sorts, one request at a time."""
    device = scores.device
    num_requests = plan.slots.shape[0]
    selected = SelectedEntries(
        torch.empty(plan.num_kept, dtype=torch.int64, device=device),
        torch.empty(plan.num_kept, dtype=torch.float32, device=device),
        torch.zeros(num_requests, arena_heads + 1, dtype=torch.int32, device=device),
    )
    columns = (
        plan.slots,
        plan.fold_old,
        plan.fold_new,
        plan.tail_blocks,
        plan.evict_blocks,
        plan.protected,
        plan.entry_base,
        plan.keep_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    for r, (slot, fold_old, fold_new, tail, evict, protected, base, keep) in enumerate(
        requests
    ):
        rows, valid, _, _ = head_rows_ref(tables, slot, fold_old, fold_new, arena_heads)
        counts = valid.sum(1)
        entry = torch.arange(rows.shape[1], device=device)[None]
        offsets = tables.block_offsets[slot, :arena_heads].long()
        head_base = offsets + torch.arange(arena_heads, device=device) * tail
        index = base + PAGE_SIZE * head_base[:, None] + entry
        own = scores[torch.where(valid, index, base)]
        forced = (entry < sinks) | (entry >= counts[:, None] - protected)
        # Entries a head does not have sort behind those that it has: equal keys keep
        # their order.
        ascending, order = own.masked_fill(forced, torch.inf).sort(dim=1, stable=True)

        prices = ascending[:, PAGE_SIZE - 1 :: PAGE_SIZE]
        exists = valid[:, PAGE_SIZE - 1 :: PAGE_SIZE]
        head_of_price = exists.nonzero()[:, 0]
        cheapest = prices[exists].sort(stable=True).indices[:evict]
        evicted = torch.bincount(head_of_price[cheapest], minlength=arena_heads)

        stays = entry >= PAGE_SIZE * evicted[:, None]
        survives = torch.zeros_like(valid).scatter_(1, order, stays) & valid
        kept = slice(keep, keep + int(survives.sum()))
        selected.source_rows[kept] = rows[survives]
        selected.scores[kept] = own[survives]
        selected.block_offsets[r, 1:] = (counts // PAGE_SIZE - evicted).cumsum(0)
    return selected


def select_entries(
    scores: torch.Tensor,
    arena_heads: int,
    tables: BlockTables,
    plan: PassPlan,
    sinks: int,
) -> SelectedEntries:
    """Choose the survivors of every request of the plan."""
    assert not use_triton(scores)
    return select_entries_ref(scores, arena_heads, tables, plan, sinks)
