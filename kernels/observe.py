"""Score resident KVs by the attention that recent queries pay them.

    score(i) = stored(i) + sum over positions p, query heads g of prob(p, g, i) ** power

or that sum times |v_i|: by how much the KV moves the output.

``prob`` is the exact softmax of sm_scale q k over all entries visible to position p:
every packed entry, and the tail entries of positions <= p. ``stored`` is the running
score in the arena, taken as 0 in a first pass. Everything is fp32; q k multiplies in
the model's dtype and adds in fp32.

The log2-sum-exp2 of a decoded query was recorded by `decode_attention`, which computes
it anyway: over the same entries, because none is evicted between two passes. That of
other queries is worked out here, which takes a sweep of its own over the keys.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``query_ring``          [slots, L, w, Hq, D]   row j: largest position p < seq_len with
                                               p % w = j; observed iff p >= query_start
``query_lse``           [slots, L, w, Hq]      fp32, row j belongs to ring row j; read
                                               where plan.recorded, else written
``scores``              [plan.num_entries]     fp32 workspace, layout in `PassPlan`;
                                               0 at positions >= seq_len
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.observe_kernels import score_kernel
from sglang_kvc.kernels.plan_heads import programs_per_head, walk_inputs
from sglang_kvc.kernels.query_lse import LOG2E, fill_lse


def observe_scores_ref(
    query_ring: torch.Tensor,
    query_lse: torch.Tensor,
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    sm_scale: float,
    power: int,
    window: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Plain torch form of `observe_scores`; loops over requests and layers."""
    heads, heads_per_page = arena.num_kv_heads, arena.heads_per_page
    keys, stored = arena.k.view(-1, arena.head_dim), arena.score.view(-1)
    values = arena.v.view(-1, arena.head_dim)
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    columns = (
        plan.slots,
        plan.seq_lens,
        plan.fold_old,
        plan.query_start,
        plan.tail_blocks,
        plan.is_first,
        plan.repeated,
        plan.recorded,
        plan.entry_base,
    )
    requests = zip(*(column.tolist() for column in columns), strict=True)
    for slot, seq_len, fold, start, tail_blocks, *flags, base in requests:
        is_first, repeated, recorded = flags
        positions = range(max(start, seq_len - window, 0), seq_len)
        query_pos = torch.tensor(positions, device=arena.k.device)
        queries = query_ring[slot, :, query_pos % window]
        for layer in range(arena.num_layers):
            first = layer * heads
            rows, valid, entry_pos, packed = head_rows_ref(
                tables, slot, fold, seq_len, heads_per_page, first, heads
            )
            # [H, J * G, D] x [H, D, n]
            query = queries[layer].unflatten(1, (heads, -1))
            group = query.shape[2]
            query = query.permute(1, 0, 2, 3).flatten(1, 2).float()
            k = keys[rows].float().masked_fill(~valid[..., None], 0)
            s = (query @ k.transpose(1, 2)) * sm_scale
            s = s.unflatten(1, (len(positions), group))
            hidden = ~valid[:, None] | (entry_pos[:, None] > query_pos[None, :, None])
            s.masked_fill_(hidden[:, :, None], float("-inf"))
            ring_rows = query_pos % window
            if not recorded:
                lse = s.logsumexp(-1).transpose(0, 1).flatten(1) * LOG2E
                query_lse[slot, layer, ring_rows] = lse
            lse = query_lse[slot, layer, ring_rows].unflatten(1, (heads, group))
            prob = (s * LOG2E - lse.transpose(0, 1)[..., None]).exp2_()
            # A query that sees nothing has a row of NaN: it scores nothing.
            prob = prob.nan_to_num_(0.0)
            total = prob.pow_(power).sum((1, 2))
            if value_norms:
                total *= values[rows].float().norm(dim=-1)
            if not is_first:
                old = stored[rows]
                total = torch.maximum(total, old) if repeated else total + old

            offsets = tables.block_offsets[slot, first : first + heads].long()
            lh = torch.arange(first, first + heads, device=offsets.device)
            head_base = base + PAGE_SIZE * (offsets + lh * tail_blocks)
            entry = torch.arange(rows.shape[1], device=offsets.device)
            scores[(head_base[:, None] + entry)[valid]] = total[valid]
    return scores


class ObserveConfig(NamedTuple):
    """Tiles of the two sweeps: queries x keys, and how the second one is run.

    `score_registers` caps the registers of a thread where that lets a multiprocessor
    hold three programs, not two: those of four warps, heads of up to 128 dimensions.
    """

    lse_rows: int
    lse_tile: int
    score_rows: int
    score_tile: int
    score_warps: int
    score_stages: int
    score_registers: int | None = None


_CONFIG = ObserveConfig(128, 32, 256, 64, 4, 3, 168)
_WIDE_CONFIG = ObserveConfig(32, 32, 32, 32, 4, 2)


def observe_scores_triton(
    query_ring: torch.Tensor,
    query_lse: torch.Tensor,
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    sm_scale: float,
    power: int,
    window: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Triton form of `observe_scores`."""
    num_requests, heads = plan.slots.shape[0], arena.heads_per_page
    group = query_ring.shape[3] // arena.num_kv_heads
    # fp32, which only tests use, needs smaller tiles.
    config = _CONFIG if arena.k.element_size() <= 2 else _WIDE_CONFIG
    row_tile = max(triton.next_power_of_2(window * group), 16)
    sizes = {
        "L": arena.num_layers,
        "H": arena.num_kv_heads,
        "G": group,
        "W": window,
        "D": arena.head_dim,
        "DP": triton.next_power_of_2(arena.head_dim),
        "S": PAGE_SIZE,
    }
    if not plan.all_recorded:
        fill_lse(
            query_ring,
            query_lse,
            arena,
            tables,
            plan,
            sm_scale,
            sizes,
            config.lse_rows,
            config.lse_tile,
        )
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    rows = num_requests * heads
    score_rows = min(row_tile, config.score_rows)
    tiles = -(-plan.max_blocks * PAGE_SIZE // config.score_tile)
    warps = config.score_warps * (2 if score_rows > 128 else 1)
    three_fit = warps == 4 and sizes["DP"] <= 128
    score_kernel[(rows, programs_per_head(rows, tiles))](
        query_ring,
        query_lse,
        arena.k,
        arena.v,
        arena.score,
        *walk_inputs(tables, plan),
        plan.query_start,
        plan.tail_blocks,
        plan.is_first,
        plan.repeated,
        plan.entry_base,
        scores,
        *tables.row_strides,
        sm_scale * LOG2E,
        ROWS=score_rows,
        TILE=config.score_tile,
        POWER=power,
        NORMS=value_norms,
        num_warps=warps,
        num_stages=config.score_stages,
        maxnreg=config.score_registers if three_fit else None,
        **sizes,
    )
    return scores


def observe_scores(
    query_ring: torch.Tensor,
    query_lse: torch.Tensor,
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    sm_scale: float,
    power: int,
    window: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Score every resident KV of the plan's requests, all layers and heads at once.

    Parameters
    ----------
    query_ring : [slots, L, w, Hq, D], contiguous, the arena's dtype; only read.
    query_lse : [slots, L, w, Hq] fp32, contiguous; what was not recorded is written.
    arena, tables, plan : only read.
    sm_scale : factor on the logits, usually D ** -0.5.
    power : 1 or 2.
    window : w.
    value_norms : weigh new mass by the L2 norm of the value, in fp32.

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32, every element written.

    Raises
    ------
    ValueError : `power` is not 1 or 2, or `window` is not the ring's.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if window != query_ring.shape[2]:
        raise ValueError(f"window must be {query_ring.shape[2]}, got {window}")
    op = observe_scores_triton if use_triton(query_ring) else observe_scores_ref
    args = (query_ring, query_lse, arena, tables, plan, sm_scale, power, window)
    return op(*args, value_norms)
