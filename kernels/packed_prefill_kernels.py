"""Triton kernel of `packed_prefill`: FlashAttention over one page list a head.

A row is (new token, query head of the group); a program has ROWS of them of one
sequence and goes through its entries once, with a running maximum. Logits carry
log2(e): exp2 throughout.
"""

import triton
import triton.language as tl

from sglang_kvc.kernels.kv_dtype import load_scale, matching_query, widen


@triton.jit
def _attend(
    query,
    state,
    arena_k,
    arena_v,
    page_list,
    begin,
    end,
    last_seen,
    qk_scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the entries [begin, end) into ``state``; MASKED: a row sees those up to
    ``last_seen`` only, and `end` may be within a tile.
    """
    acc, mass, largest = state
    d = tl.arange(0, DP)
    for start in tl.range(begin, end, TILE):
        entry = start + tl.arange(0, TILE)
        if MASKED:
            there = entry < end
            block = tl.load(page_list + entry // S, mask=there, other=0)
            ok = there[:, None] & (d < D)[None, :]
        else:
            block = tl.load(page_list + entry // S)
            ok = (d < D)[None, :]
        cell = (block.to(tl.int64) * S + entry % S)[:, None] * D + d[None, :]
        key = widen(tl.load(arena_k + cell, mask=ok, other=0), query.dtype)
        value = widen(tl.load(arena_v + cell, mask=ok, other=0), query.dtype)
        s = tl.dot(query, tl.trans(key), input_precision="ieee") * qk_scale
        if MASKED:
            s = tl.where(entry[None, :] <= last_seen[:, None], s, -float("inf"))
        new = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        fade = tl.exp2(largest - new)
        mass = mass * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision="ieee")
        largest = new
    return acc, mass, largest


@triton.jit(do_not_specialize=["layer", "width"])
def packed_prefill_kernel(
    q,
    arena_k,
    arena_v,
    scales,
    blocks,
    lens,
    cu_new,
    out,
    layer,
    num_layers,
    width,
    qk_scale,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (B * H, rows of the longest request / ROWS, rounded up): program (i, y)
    answers rows [y, y + 1) * ROWS of sequence i = b * H + h, if there are any.

    Pointers as in the docstring of ``packed_prefill``; `scales` as in ``layout``. Every
    row is written by one program.
    """
    sequence = tl.program_id(0)
    first = tl.load(cu_new + sequence // H)
    new = tl.load(cu_new + sequence // H + 1) - first
    # The rows that see most come first: they take longest.
    blocks_of_rows = tl.cdiv(new * G, ROWS)
    y = blocks_of_rows - 1 - tl.program_id(1)
    if y >= 0:
        row = y * ROWS + tl.arange(0, ROWS)
        token = row // G
        ok = token < new
        d = tl.arange(0, DP)
        head = sequence % H * G + row % G
        cell = ((first + token).to(tl.int64) * (H * G) + head)[:, None] * D + d[None, :]
        inside = ok[:, None] & (d < D)[None, :]
        query = matching_query(tl.load(q + cell, mask=inside, other=0), arena_k)

        length = tl.load(lens + sequence)
        old = length - new
        last_seen = old + token
        seen_by_all = (old + y * ROWS // G + 1) // TILE * TILE
        seen_by_any = tl.minimum(length, old + ((y + 1) * ROWS - 1) // G + 1)
        key_scale = qk_scale * load_scale(scales, layer)
        page_list = blocks + sequence.to(tl.int64) * width
        acc = tl.zeros([ROWS, DP], tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        largest = tl.full([ROWS], -float("inf"), tl.float32)
        state = (acc, mass, largest)
        state = _attend(
            query,
            state,
            arena_k,
            arena_v,
            page_list,
            0,
            seen_by_all,
            last_seen,
            key_scale,
            D,
            DP,
            S,
            TILE,
            False,
        )
        acc, mass, largest = _attend(
            query,
            state,
            arena_k,
            arena_v,
            page_list,
            seen_by_all,
            seen_by_any,
            last_seen,
            key_scale,
            D,
            DP,
            S,
            TILE,
            True,
        )
        result = acc * (load_scale(scales, num_layers + layer) / mass)[:, None]
        tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside)
