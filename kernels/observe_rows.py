"""Rows of observed queries and tiles of resident entries: what sweeps share.

Observed rows of (request, KV head): m = j * G + g is query head g of the group at ring
row j, M = w * G rows.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.kv_dtype import widen
from sglang_kvc.kernels.query_ring import (
    decode_queries,
    ring_line,
    ring_page,
    scales_of,
)

# Position of a row or an entry that sees, or shows, nothing.
HIDDEN = tl.constexpr(-2)


@triton.jit
def query_rows(row, seq_len, query_start, G: tl.constexpr, W: tl.constexpr):
    """Positions of rows `row` (HIDDEN: not observed): the largest p < seq_len with
    p % W = row // G, if it is at least query_start.
    """
    j = row // G
    position = seq_len - 1 - (seq_len - 1 - j + W) % W
    seen = (j < W) & (position >= query_start) & (position >= 0)
    return tl.where(seen, position, HIDDEN)


@triton.jit
def load_queries(
    ring_k,
    ring_v,
    ring_pages,
    slot,
    lh,
    row,
    position,
    dtype: tl.constexpr,
    LH: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    N: tl.constexpr,
):
    """Load the [rows, DP] query tile of observed rows in `dtype`; 0 in other lanes."""
    d = tl.arange(0, DP)
    seen = position >= 0
    page = ring_page(ring_pages, slot, row // G, seen, R, N)
    line = ring_line(ring_k, ring_v, page, row // G, lh, LH, G, D, R, B)
    cell = (line + row % G * D)[:, None]
    first = tl.load(cell + tl.arange(0, 8)[None, :], mask=seen[:, None], other=0)
    mask = seen[:, None] & (d < D)[None, :]
    codes = tl.load(cell + d[None, :], mask=mask, other=0)
    return decode_queries(codes, scales_of(first), dtype, DP)


@triton.jit
def load_heads(
    arena_kv, arena_row, valid, dtype: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Load [entries, DP] keys or values, in `dtype` if they are bytes; 0 in lanes not
    `valid` (None: all are).
    """
    d = tl.arange(0, DP)
    cell = arena_kv + arena_row[:, None] * D + d[None, :]
    if valid is not None:
        mask = valid[:, None] & (d < D)[None, :]
        tile = tl.load(cell, mask=mask, other=0.0)
    elif D < DP:
        tile = tl.load(cell, mask=(d < D)[None, :], other=0.0)
    else:
        tile = tl.load(cell)
    return widen(tile, dtype)
