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

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables, PassPlan
from sglang_kvc.kernels.plan_heads import head_cells_ref, head_walk
from sglang_kvc.kernels.select_kernels import count_kernel, deal_kernel
from sglang_kvc.kernels.select_survivors import survivors_kernel

DIGITS, ROUNDS = 256, 4
# What a request is charged for `SelectScratch`, caps and offsets, and for the counts of
# its groups. A head takes 1,044 bytes; the allocator rounds up.
SCRATCH_BYTES_PER_HEAD, SCRATCH_BYTES_PER_GROUP = 1088, 4 * ROUNDS * DIGITS
SHORT_BLOCK, LONG_BLOCK = 512, 2048


@dataclass(frozen=True, order=True)
class SelectionRule:
    """Rule of a selection: who competes, and what stays whatever it scores.

    Attributes
    ----------
    sinks : first entries of every head that must stay.
    groups : 1, L or L * H: heads compete inside as many equal groups. With more than
        one, every group must hold enough blocks to lose its share.
    floor_blocks : blocks that a head keeps at least; what remains must suffice.
    bound_groups : no group of so many equal ones loses more than its part of
        ``plan.evict_most``; 0: no bound. Each must hold enough to lose that.
    """

    sinks: int
    groups: int = 1
    floor_blocks: int = 0
    bound_groups: int = 0


class SelectedEntries(NamedTuple):
    """The survivors of a plan, packed: entry ``keep_base[r] + S * block_offsets[r, lh]
    + rank`` is the rank-th survivor of head lh; shapes in the module docstring.
    """

    source_rows: torch.Tensor
    scores: torch.Tensor
    block_offsets: torch.Tensor


def make_selected(tables: BlockTables, plan: PassPlan) -> SelectedEntries:
    """Allocate room for the survivors of `plan`; nothing is written."""
    num_requests, device = plan.slots.shape[0], plan.slots.device
    ints = {"dtype": torch.int32, "device": device}
    return SelectedEntries(
        source_rows=torch.empty(plan.num_kept, **ints),
        scores=torch.empty(plan.num_kept, dtype=torch.float32, device=device),
        block_offsets=torch.empty(num_requests, tables.heads_per_page + 1, **ints),
    )


def select_entries_ref(
    tables: BlockTables, plan: PassPlan, scores: torch.Tensor, *, rule: SelectionRule
) -> SelectedEntries:
    """Plain torch form of `select_entries`; sorts, one request at a time."""
    device = scores.device
    selected = make_selected(tables, plan)
    selected.block_offsets[:, 0] = 0
    for r, request in enumerate(plan.requests()):
        rows, valid, _, _ = head_rows_ref(
            tables, request.slot, request.fold_old, request.fold_new
        )
        counts = valid.sum(1)
        entry = torch.arange(rows.shape[1], device=device)[None]
        index = head_cells_ref(tables, request)[:, None] + entry
        own = scores[torch.where(valid, index, request.entry_base)]
        forced = (entry < rule.sinks) | (entry >= counts[:, None] - request.protected)
        # Entries a head does not have sort behind those that it has: equal keys keep
        # their order.
        ascending, order = own.masked_fill(forced, torch.inf).sort(dim=1, stable=True)

        prices = ascending[:, PAGE_SIZE - 1 :: PAGE_SIZE]
        block = torch.arange(prices.shape[1], device=device)
        caps = counts // PAGE_SIZE - rule.floor_blocks
        if rule.bound_groups:
            caps = cheapest_by_head(
                prices, block < caps[:, None], request.evict_most, rule.bound_groups
            )
        evicted = cheapest_by_head(
            prices, block < caps[:, None], request.evict_blocks, rule.groups
        )

        stays = entry >= PAGE_SIZE * evicted[:, None]
        survives = torch.zeros_like(valid).scatter_(1, order, stays) & valid
        kept = slice(request.keep_base, request.keep_base + int(survives.sum()))
        selected.source_rows[kept] = rows[survives].int()
        selected.scores[kept] = own[survives]
        selected.block_offsets[r, 1:] = (counts // PAGE_SIZE - evicted).cumsum(0)
    return selected


def cheapest_by_row(
    prices: torch.Tensor, exists: torch.Tensor, count: int
) -> torch.Tensor:
    """Count those of the `count` cheapest existing prices that are in each row."""
    row_of_price = exists.nonzero()[:, 0]
    cheapest = prices[exists].sort(stable=True).indices[:count]
    return torch.bincount(row_of_price[cheapest], minlength=len(prices))


def cheapest_by_head(
    prices: torch.Tensor, exists: torch.Tensor, count: int, groups: int
) -> torch.Tensor:
    """Run `cheapest_by_row` on groups of consecutive heads that lose equally many."""
    pairs = zip(prices.chunk(groups), exists.chunk(groups), strict=True)
    return torch.cat([cheapest_by_row(*pair, count // groups) for pair in pairs])


def scan_block(entries: int, heads: int) -> int:
    """Entries that a program looks at together: many of long heads, few where most of
    a block would lie behind the end of a short one. A kernel each.
    """
    return LONG_BLOCK if entries >= LONG_BLOCK * heads else SHORT_BLOCK


class SelectScratch(NamedTuple):
    """Scratch of a selection: what its launches leave for each other, by head.

    Attributes
    ----------
    prefix : [R * L * H] int32, digits of the threshold that are chosen so far.
    below : [R * L * H] int32, entries below them.
    histogram : [R * L * H, DIGITS] int32, of the others by their next digit.
    evicted : [R * L * H] int32, blocks to lose.
    """

    prefix: torch.Tensor
    below: torch.Tensor
    histogram: torch.Tensor
    evicted: torch.Tensor


def make_scratch(heads: int, device: torch.device | str) -> SelectScratch:
    """Allocate the scratch of `heads` heads, all requests together."""
    ints = {"dtype": torch.int32, "device": device}
    # Tensors of their own are aligned: rows of one would make Triton compile anew.
    return SelectScratch(
        prefix=torch.empty(heads, **ints),
        below=torch.empty(heads, **ints),
        histogram=torch.empty(heads, DIGITS, **ints),
        evicted=torch.empty(heads, **ints),
    )


def deal(
    tables: BlockTables,
    plan: PassPlan,
    scores: torch.Tensor,
    scratch: SelectScratch,
    wanted: torch.Tensor,
    caps: torch.Tensor | None,
    new_offsets: torch.Tensor,
    *,
    groups: int,
    rule: SelectionRule,
) -> None:
    """Write ``scratch.evicted`` and `new_offsets`: whose blocks go; five launches.

    Parameters
    ----------
    tables, plan, scores : as in `select_entries`.
    wanted : [R] int64, blocks that go, as many from each of `groups` groups.
    caps : [R * L * H] int32, the most that each head may lose; None: all but its floor.
    new_offsets : [R, L * H + 1] int32, block offsets of what stays.
    """
    heads, num_requests = tables.heads_per_page, plan.slots.shape[0]
    rows = num_requests * heads
    axes = {"LH": heads, "S": PAGE_SIZE, "GROUPS": groups, "num_warps": 4}
    priced = torch.zeros(
        ROUNDS, num_requests * groups, DIGITS, dtype=torch.int32, device=scores.device
    )
    for step in range(ROUNDS):
        count_kernel[(rows,)](
            tables.block_offsets,
            plan.slots,
            plan.tail_blocks,
            plan.fold_blocks,
            plan.protected,
            plan.entry_base,
            wanted,
            scores,
            scratch,
            priced,
            caps,
            8 * (ROUNDS - 1 - step),
            rule.sinks,
            rule.floor_blocks,
            FIRST=step == 0,
            BLOCK=scan_block(plan.num_entries, rows),
            **axes,
        )
    deal_kernel[(num_requests * groups,)](
        tables.block_offsets,
        plan.slots,
        plan.fold_blocks,
        wanted,
        scratch,
        priced,
        caps,
        new_offsets,
        rule.floor_blocks,
        BLOCK=min(32, triton.next_power_of_2(heads // groups)),
        **axes,
    )


def select_entries_triton(
    tables: BlockTables, plan: PassPlan, scores: torch.Tensor, *, rule: SelectionRule
) -> SelectedEntries:
    """Triton form of `select_entries`; 7 launches, 14 with a bound, for any sizes."""
    heads = tables.heads_per_page
    rows = plan.slots.shape[0] * heads
    scratch, selected = make_scratch(rows, scores.device), make_selected(tables, plan)
    where, offsets, caps = (tables, plan, scores, scratch), selected.block_offsets, None
    if rule.bound_groups:
        most, groups = plan.evict_most, rule.bound_groups
        deal(*where, most, None, offsets, groups=groups, rule=rule)
        caps = scratch.evicted.clone()
    deal(*where, plan.evict_blocks, caps, offsets, groups=rule.groups, rule=rule)
    survivors_kernel[(rows,)](
        head_walk(tables, plan),
        plan.fold_blocks,
        plan.protected,
        plan.keep_base,
        scores,
        scratch.evicted,
        selected,
        *tables.row_strides,
        rule.sinks,
        LH=heads,
        S=PAGE_SIZE,
        BLOCK=scan_block(plan.num_entries, rows),
        num_warps=4,
    )
    return selected


def select_entries(
    tables: BlockTables, plan: PassPlan, scores: torch.Tensor, *, rule: SelectionRule
) -> SelectedEntries:
    """Choose the survivors of every request of the plan.

    Parameters
    ----------
    tables, plan : as they were when the scores were made; only read.
    scores : [plan.num_entries] fp32 >= 0, pooled; only read.
    rule : who competes, and what stays.

    Returns
    -------
    SelectedEntries : new tensors. If a plan asks for more blocks than unforced entries
        allow, forced ones go too, in the same order, so that sizes always hold.
    """
    op = select_entries_triton if use_triton(scores) else select_entries_ref
    return op(tables, plan, scores, rule=rule)
