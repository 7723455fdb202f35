"""Choose the KVs that survive: Algorithm 1 of KV-Compress, without its hanging blocks.

All heads of a request compete with the n_h = S * (packed + fold) blocks that they hold.
With a_h the ascending scores of head h, freeing its k-th block costs
price_h[k] = a_h[S * k + S - 1]. The E cheapest blocks over all heads go, ties by
(head, k); a head that loses e_h blocks loses its S * e_h lowest entries, ties by
ordinal. Survivors keep their order. Sinks and protected entries count as +inf.

Other allocations are the same with other *groups*: heads compete inside a group of
consecutive heads, and every group loses E / groups blocks. One group is the paper's
joint allocation, L groups keep as much in every layer, L * H groups in every head. A
head is left its last `floor_blocks` blocks, or all it has if that is less.

What a group may lose can be bounded while heads of all groups compete: a first
selection evicts all that each of `bound_groups` may lose, and no head loses more in the
second than it did in the first. Within a group both take the cheapest first.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``scores``              [plan.num_entries]     fp32 >= 0, layout in `PassPlan`
``source_rows``         [plan.num_kept] int32  arena row of each survivor
``kept_scores``         [plan.num_kept] fp32   its score
``block_offsets``       [R, L*H + 1] int32     exclusive prefix sum of n_h / S - e_h
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan
from sglang_kvc.kernels.select_kernels import count_kernel, deal_kernel
from sglang_kvc.kernels.select_survivors import survivors_kernel

DIGITS, ROUNDS = 256, 4
SHORT_BLOCK, LONG_BLOCK = 512, 2048


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
    groups: int = 1,
    floor_blocks: int = 0,
    bound_groups: int = 0,
) -> SelectedEntries:
    """Plain torch form of `select_entries`; sorts, one request at a time."""
    device = scores.device
    num_requests = plan.slots.shape[0]
    selected = SelectedEntries(
        torch.empty(plan.num_kept, dtype=torch.int32, device=device),
        torch.empty(plan.num_kept, dtype=torch.float32, device=device),
        torch.zeros(num_requests, arena_heads + 1, dtype=torch.int32, device=device),
    )
    columns = (
        plan.slots,
        plan.fold_old,
        plan.fold_new,
        plan.tail_blocks,
        plan.evict_blocks,
        plan.evict_most,
        plan.protected,
        plan.entry_base,
        plan.keep_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    for r, (
        slot,
        fold_old,
        fold_new,
        tail,
        evict,
        most,
        protected,
        base,
        keep,
    ) in enumerate(requests):
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
        block = torch.arange(prices.shape[1], device=device)
        caps = counts // PAGE_SIZE - floor_blocks
        if bound_groups:
            caps = cheapest_by_head(prices, block < caps[:, None], most, bound_groups)
        evicted = cheapest_by_head(prices, block < caps[:, None], evict, groups)

        stays = entry >= PAGE_SIZE * evicted[:, None]
        survives = torch.zeros_like(valid).scatter_(1, order, stays) & valid
        kept = slice(keep, keep + int(survives.sum()))
        selected.source_rows[kept] = rows[survives].int()
        selected.scores[kept] = own[survives]
        selected.block_offsets[r, 1:] = (counts // PAGE_SIZE - evicted).cumsum(0)
    return selected


def cheapest_by_row(
    prices: torch.Tensor, exists: torch.Tensor, count: int
) -> torch.Tensor:
    """How many of the `count` cheapest existing prices are in each row."""
    row_of_price = exists.nonzero()[:, 0]
    cheapest = prices[exists].sort(stable=True).indices[:count]
    return torch.bincount(row_of_price[cheapest], minlength=len(prices))


def cheapest_by_head(
    prices: torch.Tensor, exists: torch.Tensor, count: int, groups: int
) -> torch.Tensor:
    """`cheapest_by_row` of groups of consecutive heads that lose equally many."""
    pairs = zip(prices.chunk(groups), exists.chunk(groups), strict=True)
    return torch.cat([cheapest_by_row(*pair, count // groups) for pair in pairs])


def scan_block(entries: int, heads: int) -> int:
    """Entries that a program looks at together: many of long heads, few where most of
    a block would lie behind the end of a short one. A kernel each.
    """
    return LONG_BLOCK if entries >= LONG_BLOCK * heads else SHORT_BLOCK


def select_entries_triton(
    scores: torch.Tensor,
    arena_heads: int,
    tables: BlockTables,
    plan: PassPlan,
    sinks: int,
    groups: int = 1,
    floor_blocks: int = 0,
    bound_groups: int = 0,
) -> SelectedEntries:
    """Triton form of `select_entries`; 7 launches, 14 with a bound, for any sizes."""
    device = scores.device
    num_requests = plan.slots.shape[0]
    rows = num_requests * arena_heads
    ints = {"dtype": torch.int32, "device": device}
    # Tensors of their own are aligned: rows of one would make Triton compile anew.
    prefix, below, evicted = (torch.empty(rows, **ints) for _ in range(3))
    histogram = torch.empty(rows, DIGITS, **ints)
    selected = SelectedEntries(
        torch.empty(plan.num_kept, **ints),
        torch.empty(plan.num_kept, dtype=torch.float32, device=device),
        torch.empty(num_requests, arena_heads + 1, **ints),
    )
    block = scan_block(plan.num_entries, rows)
    axes = {"LH": arena_heads, "S": PAGE_SIZE}

    def deal(wanted: torch.Tensor, groups: int, caps: torch.Tensor | None) -> None:
        """Write `evicted` and the block offsets; `caps`: most that a head may lose."""
        priced = torch.zeros(ROUNDS, num_requests * groups, DIGITS, **ints)
        most = evicted if caps is None else caps
        for step in range(ROUNDS):
            count_kernel[(rows,)](
                scores,
                tables.block_offsets,
                plan.slots,
                plan.tail_blocks,
                plan.fold_blocks,
                wanted,
                plan.protected,
                plan.entry_base,
                prefix,
                below,
                histogram,
                priced,
                most,
                8 * (ROUNDS - 1 - step),
                sinks,
                floor_blocks,
                GROUPS=groups,
                FIRST=step == 0,
                CAPPED=caps is not None,
                BLOCK=block,
                num_warps=4,
                **axes,
            )
        deal_kernel[(num_requests * groups,)](
            tables.block_offsets,
            plan.slots,
            plan.fold_blocks,
            wanted,
            below,
            histogram,
            priced,
            evicted,
            selected.block_offsets,
            most,
            floor_blocks,
            GROUPS=groups,
            CAPPED=caps is not None,
            BLOCK=min(32, triton.next_power_of_2(arena_heads // groups)),
            num_warps=4,
            **axes,
        )

    caps = None
    if bound_groups:
        deal(plan.evict_most, bound_groups, None)
        caps = evicted.clone()
    deal(plan.evict_blocks, groups, caps)
    survivors_kernel[(rows,)](
        scores,
        tables.req_to_token,
        tables.block_offsets,
        tables.packed_pages,
        plan.slots,
        plan.fold_old,
        plan.tail_blocks,
        plan.fold_blocks,
        plan.protected,
        plan.entry_base,
        plan.keep_base,
        evicted,
        selected.block_offsets,
        selected.source_rows,
        selected.scores,
        *tables.row_strides,
        sinks,
        BLOCK=block,
        num_warps=4,
        **axes,
    )
    return selected


def select_entries(
    scores: torch.Tensor,
    arena_heads: int,
    tables: BlockTables,
    plan: PassPlan,
    sinks: int,
    groups: int = 1,
    floor_blocks: int = 0,
    bound_groups: int = 0,
) -> SelectedEntries:
    """Choose the survivors of every request of the plan.

    Parameters
    ----------
    scores : [plan.num_entries] fp32 >= 0, pooled; only read.
    arena_heads : L * H.
    tables : the tables as they were when the scores were made; only read.
    plan : only read.
    sinks : first entries of every head that must stay.
    groups : 1, L or L * H: heads compete inside as many equal groups. With more than
        one, every group must hold enough blocks to lose its share.
    floor_blocks : blocks that a head keeps at least; what remains must suffice.
    bound_groups : no group of so many equal ones loses more than its part of
        ``plan.evict_most``; 0: no bound. Each must hold enough to lose that.

    Returns
    -------
    SelectedEntries : new tensors. If a plan asks for more blocks than unforced entries
        allow, forced ones go too, in the same order, so that sizes always hold.
    """
    op = select_entries_triton if use_triton(scores) else select_entries_ref
    return op(
        scores, arena_heads, tables, plan, sinks, groups, floor_blocks, bound_groups
    )
