"""Score resident KVs by the attention that recent queries pay them.

    score(i) = stored(i) + sum over positions p, query heads g of prob(p, g, i) ** power

or that sum times |v_i|: by how much the KV moves the output.

``prob`` is the exact softmax of sm_scale q k over all entries visible to position p:
every packed entry, and the tail entries of positions <= p. ``stored`` is the running
score in the arena, taken as 0 in a first pass. Everything is fp32; q k multiplies in
the model's dtype and adds in fp32.

What softmax divides by is worked out here, by a sweep of its own over the keys: from
the queries as the ring has them, which are rounded. Of the exact queries it would be
another number, and probabilities could be far above 1.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``query_ring``          see ``query_ring``     row j: largest position p < seq_len with
                                               p % w = j; observed iff p >= query_start
``scores``              [plan.num_entries]     fp32 workspace, layout in `PassPlan`;
                                               0 at positions >= seq_len
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.kv_dtype import gather_rows, kernel_arena, kv_scales
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables, PassPlan
from sglang_kvc.kernels.observe_kernels import score_kernel
from sglang_kvc.kernels.plan_heads import (
    head_cells_ref,
    head_walk,
    programs_per_head,
)
from sglang_kvc.kernels.query_lse import LOG2E, query_lse
from sglang_kvc.kernels.query_ring import (
    QueryRing,
    load_queries_ref,
    query_dtype,
)


def observe_scores_ref(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    query_ring: QueryRing,
    *,
    group: int,
    sm_scale: float,
    power: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Plain torch form of `observe_scores`; loops over requests and layers."""
    heads, window = arena.num_kv_heads, query_ring.window
    stored = arena.score.view(-1)
    scores = torch.zeros(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    for request in plan.requests():
        slot, seq_len = request.slot, request.seq_len
        cells = head_cells_ref(tables, request)
        positions = range(max(request.query_start, seq_len - window, 0), seq_len)
        query_pos = torch.tensor(positions, device=arena.k.device)
        ring_rows = query_pos % window
        queries = load_queries_ref(
            query_ring,
            torch.full_like(query_pos, slot),
            ring_rows,
            group=group,
            head_dim=arena.head_dim,
            dtype=query_dtype(arena),
        )
        for layer in range(arena.num_layers):
            k_scale, v_scale = kv_scales(arena, layer)
            first = layer * heads
            rows, valid, entry_pos, _ = head_rows_ref(
                tables,
                slot,
                request.fold_old,
                seq_len,
                first_head=first,
                num_heads=heads,
            )
            # [H, J * G, D] x [H, D, n]
            query = queries[:, layer].unflatten(1, (heads, group))
            query = query.permute(1, 0, 2, 3).flatten(1, 2).float()
            k = gather_rows(arena.k, rows, k_scale)
            k = k.masked_fill_(~valid[..., None], 0)
            s = (query @ k.transpose(1, 2)) * sm_scale
            s = s.unflatten(1, (len(positions), group))
            hidden = ~valid[:, None] | (entry_pos[:, None] > query_pos[None, :, None])
            s.masked_fill_(hidden[:, :, None], float("-inf"))
            # A query that sees nothing has a row of NaN: it scores nothing.
            lse = s.logsumexp(-1, keepdim=True) * LOG2E
            prob = (s * LOG2E - lse).exp2_().nan_to_num_(0.0)
            total = prob.pow_(power).sum((1, 2))
            if value_norms:
                total *= gather_rows(arena.v, rows, v_scale).norm(dim=-1)
            if not request.is_first:
                old = stored[rows]
                merge = torch.maximum if request.repeated else torch.add
                total = merge(total, old)

            entry = torch.arange(rows.shape[1], device=rows.device)
            index = cells[first : first + heads, None] + entry
            scores[index[valid]] = total[valid]
    return scores


class ObserveConfig(NamedTuple):
    """Tiles of the two sweeps: queries x keys, and how the second one is run.

    The last two cap the registers of a thread where that lets a multiprocessor hold
    three programs, not two: heads of up to 128 dimensions; of the second sweep those of
    four warps, of the first those of 128 queries.
    """

    lse_rows: int
    lse_tile: int
    score_rows: int
    score_tile: int
    score_warps: int
    score_stages: int
    score_registers: int | None = None
    lse_registers: int | None = None


_CONFIG = ObserveConfig(
    lse_rows=128,
    lse_tile=32,
    score_rows=256,
    score_tile=64,
    score_warps=4,
    score_stages=3,
    score_registers=168,
    lse_registers=80,
)
# Queries that are read again for every tile of keys, or that are wide: what the
# pipeline holds of them must fit in the 99 KiB of an Ada GPU.
_MANY_CONFIG = _CONFIG._replace(score_rows=128, score_warps=8, score_stages=2)
_LONG_CONFIG = _MANY_CONFIG._replace(
    lse_rows=64, score_rows=64, score_tile=32, score_warps=4, lse_registers=None
)
_WIDE_CONFIG = ObserveConfig(
    lse_rows=32,
    lse_tile=32,
    score_rows=32,
    score_tile=32,
    score_warps=4,
    score_stages=2,
)


def _config(rows: int, padded_dim: int, itemsize: int) -> ObserveConfig:
    """Tiles for `rows` observed queries of a KV head."""
    if itemsize > 2:
        # fp32, which only tests use.
        return _WIDE_CONFIG
    if padded_dim > 128:
        return _LONG_CONFIG
    return _CONFIG if rows <= _CONFIG.score_rows else _MANY_CONFIG


def observe_scores_triton(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    query_ring: QueryRing,
    *,
    group: int,
    sm_scale: float,
    power: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Triton form of `observe_scores`."""
    num_requests, heads = plan.slots.shape[0], arena.heads_per_page
    row_tile = max(triton.next_power_of_2(query_ring.window * group), 16)
    sizes = {
        "L": arena.num_layers,
        "H": arena.num_kv_heads,
        "G": group,
        **query_ring.sizes(group, arena.head_dim),
        "D": arena.head_dim,
        "DP": triton.next_power_of_2(arena.head_dim),
        "S": PAGE_SIZE,
    }
    config = _config(row_tile, sizes["DP"], arena.k.element_size())
    row_lse = query_lse(
        arena,
        tables,
        plan,
        query_ring,
        sm_scale=sm_scale,
        sizes=sizes,
        max_rows=config.lse_rows,
        tile=config.lse_tile,
        max_registers=config.lse_registers,
    )
    scores = torch.empty(plan.num_entries, dtype=torch.float32, device=arena.k.device)
    rows = num_requests * heads
    score_rows = min(row_tile, config.score_rows)
    tiles = -(-plan.max_blocks * PAGE_SIZE // config.score_tile)
    warps = config.score_warps * (2 if score_rows > 128 else 1)
    three_fit = warps == 4 and sizes["DP"] <= 128
    score_kernel[(rows, programs_per_head(rows, tiles))](
        *kernel_arena(arena),
        head_walk(tables, plan),
        plan.query_start,
        plan.is_first,
        plan.repeated,
        *query_ring[:3],
        row_lse,
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
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    query_ring: QueryRing,
    *,
    group: int,
    sm_scale: float,
    power: int,
    value_norms: bool = False,
) -> torch.Tensor:
    """Score every resident KV of the plan's requests, all layers and heads at once.

    Parameters
    ----------
    arena, tables, plan : only read.
    query_ring : only read.
    group : query heads of a KV head.
    sm_scale : factor on the logits, usually D ** -0.5.
    power : 1 or 2.
    value_norms : weigh new mass by the L2 norm of the value, in fp32.

    Returns
    -------
    torch.Tensor : [plan.num_entries] fp32, every element written.

    Raises
    ------
    ValueError : `power` is not 1 or 2.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    op = observe_scores_triton if use_triton(arena.k) else observe_scores_ref
    return op(
        arena,
        tables,
        plan,
        query_ring,
        group=group,
        sm_scale=sm_scale,
        power=power,
        value_norms=value_norms,
    )
