"""Log2-sum-exp2 of observed queries: what softmax divides their probabilities by.

`lse_kernel` reduces shares of the entries, `merge_lse_kernel` their results. Logits
carry log2(e): exp2 and log2 throughout. They can be large (biases of queries take them
to 18,000), so sums stay fp32: fp16 has steps of 16 there.
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.addressing import tile_rows
from sglang_kvc.kernels.kv_dtype import load_scale, matching_dtype, stored_bytes
from sglang_kvc.kernels.layout import Arena, BlockTables, PassPlan
from sglang_kvc.kernels.observe_rows import load_heads, load_queries, query_rows
from sglang_kvc.kernels.plan_heads import (
    MAX_SPLITS,
    head_pages,
    head_walk,
    plan_head,
    split_heads,
)
from sglang_kvc.kernels.query_ring import QueryRing

LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["first_request"])
def lse_kernel(
    arena_k,
    arena_scales,
    walk,
    query_starts,
    ring_k,
    ring_v,
    ring_pages,
    partial_lse,
    token_table_stride,
    page_table_stride,
    first_request,
    qk_scale,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (requests * L * H, P): program (x, s) reduces one of P equal shares of the
    entries of head x % (L * H) of request first_request + x // (L * H).

    Pointers: arena and ring as in ``layout``; walk a `HeadWalk`; query_starts [R]
    int64; partial_lse [requests * L * H, P, W * G] fp32: -inf where a row sees nothing
    of the share. Rows are taken ROWS at a time.
    """
    LH: tl.constexpr = L * H
    x = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    r = first_request + x // LH
    lh = x % LH
    slot, fold_len, first_block, packed_len, n, _, _ = plan_head(walk, r, lh, LH, S)
    seq_len = fold_len + n - packed_len
    query_start = tl.load(query_starts + r).to(tl.int32)
    share = tl.cdiv(tl.cdiv(n, num_splits), TILE) * TILE
    start = split * share
    end = tl.minimum(start + share, n)
    pages, tail_tokens = head_pages(
        walk, slot, fold_len, packed_len, token_table_stride, page_table_stride
    )
    qk_scale = qk_scale * load_scale(arena_scales, lh // H)
    t = tl.arange(0, TILE)
    rings = (ring_k, ring_v, ring_pages)
    dtype: tl.constexpr = matching_dtype(arena_k.dtype.element_ty)
    out = partial_lse + (x.to(tl.int64) * num_splits + split) * (W * G)

    for first_row in range(0, W * G, ROWS):
        row = first_row + tl.arange(0, ROWS)
        position = query_rows(row, seq_len, query_start, G, W)
        query = load_queries(
            *rings, slot, lh, row, position, dtype, LH, G, D, DP, R, B, N
        )
        m = tl.full([ROWS], float("-inf"), tl.float32)
        denom = tl.zeros([ROWS], tl.float32)
        for i in range(start, end, TILE):
            entry = i + t
            valid = entry < end
            arena_row = tile_rows(
                i, end, lh, packed_len, first_block, pages, tail_tokens, LH, S, TILE
            )
            key = load_heads(arena_k, arena_row, valid, query.dtype, D, DP)
            at = tl.where(entry < packed_len, -1, fold_len + entry - packed_len)
            s = tl.dot(query, tl.trans(key), input_precision="ieee") * qk_scale
            visible = valid[None, :] & (at[None, :] <= position[:, None])
            s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # A row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            mass = tl.sum(tl.exp2(s - shift[:, None]), 1)
            denom = denom * tl.exp2(m - shift) + mass
            m = m_new
        lse = m + tl.log2(tl.maximum(denom, 1e-38))
        lse = tl.where(denom > 0, lse, float("-inf"))
        tl.store(out + row, lse, mask=row < W * G)


@triton.jit(do_not_specialize=["num_splits"])
def merge_lse_kernel(
    partial_lse,
    query_lse,
    num_splits,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid (heads, row blocks): log2-sum-exp2 over dim 1 of the partials
    [heads, num_splits, M] into query_lse [heads, M]; inf where a row sees nothing, so
    that any key gets 2 ** -inf.
    """
    x = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, MAX_SPLITS)
    part = tl.load(
        partial_lse + (x * num_splits + split[:, None]) * M + row[None, :],
        mask=(split < num_splits)[:, None] & (row < M)[None, :],
        other=float("-inf"),
    )
    m = tl.max(part, 0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    denom = tl.sum(tl.exp2(part - shift[None, :]), 0)
    merged = shift + tl.log2(tl.maximum(denom, 1e-38))
    merged = tl.where(denom > 0, merged, float("inf"))
    tl.store(query_lse + x * M + row, merged, mask=row < M)


def query_lse(
    arena: Arena,
    tables: BlockTables,
    plan: PassPlan,
    query_ring: QueryRing,
    *,
    sm_scale: float,
    sizes: dict[str, int],
    max_rows: int,
    tile: int,
    max_registers: int | None,
) -> torch.Tensor:
    """Work out the log2-sum-exp2 of every observed query.

    Parameters
    ----------
    arena, tables, plan, query_ring : as in `observe_scores`.
    sm_scale : as in `observe_scores`.
    sizes : L, H, G, W, R, B, N, D, DP and S, which `lse_kernel` is compiled for.
    max_rows, tile : queries and keys that a program takes at a time.
    max_registers : that a thread may use if a program takes all of 65 to 128 queries;
        None: any.

    Returns
    -------
    torch.Tensor : [R, L * H, w * G] fp32, rows as in ``observe_rows``; inf where a row
        is not observed or sees nothing.
    """
    num_requests, heads = plan.slots.shape[0], arena.heads_per_page
    num_rows = sizes["W"] * sizes["G"]
    lse_rows = min(max(triton.next_power_of_2(num_rows), 16), max_rows)
    splits, chunk = split_heads(plan, heads, entries=1024, values=num_rows)
    made = {"dtype": torch.float32, "device": arena.k.device}
    partial = torch.empty(chunk * heads * splits * num_rows, **made)
    merged = torch.empty(num_requests, heads, num_rows, **made)
    walk = head_walk(tables, plan)
    for first in range(0, num_requests, chunk):
        rows = min(chunk, num_requests - first) * heads
        lse_kernel[(rows, splits)](
            stored_bytes(arena.k),
            arena.scales,
            walk,
            plan.query_start,
            *query_ring[:3],
            partial,
            *tables.row_strides,
            first,
            sm_scale * LOG2E,
            ROWS=lse_rows,
            TILE=tile,
            num_warps=8 if lse_rows == 128 else 4,
            maxnreg=max_registers if lse_rows == 128 >= num_rows else None,
            **sizes,
        )
        merge_lse_kernel[(rows, -(-num_rows // 128))](
            partial,
            merged[first:],
            splits,
            M=num_rows,
            BLOCK=128,
            MAX_SPLITS=MAX_SPLITS,
        )
    return merged
