"""Write the K, V and query of new tokens: k, v -> arena, q -> query ring.

======================  =====================  =========================================
tensor                  shape                  written
======================  =====================  =========================================
``arena.k``, ``.v``     [pages, L, H, S, D]    [t // S, layer, :, t % S] = k, v
``arena.score``         [pages, L, H, S]       [t // S, layer, :, t % S] = 0
``query_ring``          see ``query_ring``     row p % w of a slot = q, in 8 bits
======================  =====================  =========================================

with t = out_cache_loc and slot * w + p % w = ring_index (-1: not recorded). This kernel
serves prefill; a decode step may leave the writing to `decode_attention`.
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.kv_dtype import (
    kv_scales,
    load_scale,
    narrow,
    narrow_ref,
    stored_bytes,
)
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.kernels.query_ring import (
    QueryRing,
    encode_queries,
    ring_line,
    ring_page,
    store_queries_ref,
)


def append_kv_ref(
    arena: Arena,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    out_cache_loc: torch.Tensor,
    query_ring: QueryRing,
    ring_index: torch.Tensor,
    *,
    layer: int,
) -> None:
    """Plain torch form of `append_kv`."""
    page, offset = out_cache_loc // PAGE_SIZE, out_cache_loc % PAGE_SIZE
    for cells, new, scale in zip(
        arena[:2], (k, v), kv_scales(arena, layer), strict=True
    ):
        stored = stored_bytes(narrow_ref(new, scale, cells.dtype))
        stored_bytes(cells)[page, layer, :, offset] = stored
    arena.score[page, layer, :, offset] = 0.0
    recorded = ring_index >= 0
    slots = ring_index[recorded] // query_ring.window
    rows = ring_index[recorded] % query_ring.window
    store_queries_ref(query_ring, slots, rows, q[recorded], layer=layer)


@triton.jit
def store_token(
    k,
    v,
    token,
    lh,
    arena_k,
    arena_v,
    arena_score,
    LH: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    DP: tl.constexpr,
):
    """Write k and v, as `narrow` gives them, D elements in DP lanes, to head `lh` of
    `token`, with score 0.
    """
    d = tl.arange(0, DP)
    row = (token // S * LH + lh) * S + token % S
    tl.store(arena_k + row * D + d, k, mask=d < D)
    tl.store(arena_v + row * D + d, v, mask=d < D)
    tl.store(arena_score + row, 0.0)


@triton.jit(do_not_specialize=["layer"])
def _append_kernel(
    k,
    v,
    q,
    arena_k,
    arena_v,
    arena_score,
    scales,
    out_cache_loc,
    ring_k,
    ring_v,
    ring_pages,
    ring_index,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    q_token_stride,
    q_head_stride,
    layer,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
):
    """Grid (N, H): program (n, h) writes KV head h of token n and its G query heads.

    Pointers: k, v [N, H, D] and q [N, H * G, D], any token and head stride; arena and
    ring as in the module docstring, contiguous; out_cache_loc, ring_index [N] int64.
    Lanes d >= D (padding to a power of two) and g >= G are masked. Two programs write
    the same cell only for equal out_cache_loc: the padding rows of a decode graph, all
    at token 0 of the padding page, whose content nobody uses.
    """
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, DP)
    lane = d < D
    k_cell = n * k_token_stride + h * k_head_stride + d
    v_cell = n * v_token_stride + h * v_head_stride + d
    key = tl.load(k + k_cell, mask=lane, other=0.0)
    value = tl.load(v + v_cell, mask=lane, other=0.0)
    store_token(
        narrow(key, load_scale(scales, layer), arena_k),
        narrow(value, load_scale(scales, L + layer), arena_v),
        tl.load(out_cache_loc + n),
        layer * H + h,
        arena_k,
        arena_v,
        arena_score,
        L * H,
        D,
        S,
        DP,
    )

    ring = tl.load(ring_index + n)
    if ring >= 0:
        g = tl.arange(0, GP)
        mask = (g < G)[:, None] & lane[None, :]
        query_head = h * G + g
        query = tl.load(
            q + n * q_token_stride + query_head[:, None] * q_head_stride + d[None, :],
            mask=mask,
            other=0.0,
        )
        page = ring_page(ring_pages, ring // W, ring % W, True, R, N)
        lh = layer * H + h
        line = ring_line(ring_k, ring_v, page, ring % W, lh, L * H, G, D, R, B)
        cell = line + g[:, None] * D + d[None, :]
        tl.store(cell, encode_queries(query, DP), mask=mask & (page > 0))


def append_kv_triton(
    arena: Arena,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    out_cache_loc: torch.Tensor,
    query_ring: QueryRing,
    ring_index: torch.Tensor,
    *,
    layer: int,
) -> None:
    """Triton form of `append_kv`; one compilation serves all layers."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    group = q.shape[1] // num_kv_heads
    _append_kernel[(num_tokens, num_kv_heads)](
        k,
        v,
        q,
        stored_bytes(arena.k),
        stored_bytes(arena.v),
        arena.score,
        arena.scales,
        out_cache_loc,
        *query_ring[:3],
        ring_index,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        q.stride(0),
        q.stride(1),
        layer,
        L=arena.num_layers,
        H=num_kv_heads,
        G=group,
        **query_ring.sizes(group, head_dim),
        D=head_dim,
        S=PAGE_SIZE,
        GP=triton.next_power_of_2(group),
        DP=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def append_kv(
    arena: Arena,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    out_cache_loc: torch.Tensor,
    query_ring: QueryRing,
    ring_index: torch.Tensor,
    *,
    layer: int,
) -> None:
    """Store one layer's K and V of N tokens, zero their scores, record their queries.

    Parameters
    ----------
    arena : written in place.
    k, v : [N, H, D], last dimension contiguous; stored as ``kv_dtype`` says.
    q : [N, Hq, D], last dimension contiguous, after RoPE.
    out_cache_loc : [N] int64 token ids. Equal ids (the padding rows of a decode graph)
        leave one of the rows.
    query_ring : written in place; slots without a ring record nothing.
    ring_index : [N] int64, slot * w + p % w, or -1 to record nothing. The indices that
        are not -1 must differ.
    layer : which layer of the arena and the ring.
    """
    op = append_kv_triton if use_triton(k) else append_kv_ref
    op(arena, k, v, q, out_cache_loc, query_ring, ring_index, layer=layer)
