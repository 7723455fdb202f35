"""Address arithmetic shared by the ops: the i-th entry of a head -> its arena row.

Both halves restate the module docstring of ``layout``: `head_rows_ref` for the
references (host integers, padded matrices) and `entry_rows` for the Triton kernels.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables


class HeadRows(NamedTuple):
    """Entries of consecutive heads of one request, padded to the longest head.

    Attributes
    ----------
    rows : [heads, n_max] int64, arena row of each entry; 0 where not `valid`.
    valid : [heads, n_max] bool, whether the head has this entry.
    positions : [heads, n_max] int64, logical position of a tail entry, -1 if packed.
    packed : [heads] int64, packed entries of each head.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    packed: torch.Tensor


def head_rows_ref(
    tables: BlockTables,
    slot: int,
    fold_len: int,
    end: int,
    *,
    first_head: int = 0,
    num_heads: int | None = None,
) -> HeadRows:
    """Locate all entries of heads [first_head, first_head + num_heads) of a request.

    Parameters
    ----------
    tables : block tables; only read.
    slot : row of the request in every table.
    fold_len : logical tokens held as packed blocks.
    end : logical positions [fold_len, end) are the tail.
    first_head, num_heads : range of lh = layer * H + head; all heads by default.
    """
    heads_per_page = tables.heads_per_page
    heads = heads_per_page if num_heads is None else num_heads
    device = tables.block_offsets.device
    offsets = tables.block_offsets[slot, first_head : first_head + heads + 1].long()
    packed = (offsets[1:] - offsets[:-1]) * PAGE_SIZE
    counts = packed + (end - fold_len)
    entry = torch.arange(int(counts.max()), device=device)[None]
    valid = entry < counts[:, None]
    is_packed = entry < packed[:, None]
    positions = torch.where(is_packed, -1, fold_len + entry - packed[:, None])

    ordinal = offsets[:-1, None] + entry // PAGE_SIZE
    pages = tables.packed_pages[slot].long()
    # Lanes of the other segment would index past the tables: send them to cell 0.
    ordinal = torch.where(is_packed, ordinal, 0)
    block = pages[ordinal // heads_per_page] * heads_per_page + ordinal % heads_per_page
    packed_rows = block * PAGE_SIZE + entry % PAGE_SIZE

    tokens = tables.req_to_token[slot].long()
    token = tokens[torch.where(valid & ~is_packed, positions, 0)]
    lh = torch.arange(first_head, first_head + heads, device=device)[:, None]
    tail_rows = (token // PAGE_SIZE * heads_per_page + lh) * PAGE_SIZE
    tail_rows += token % PAGE_SIZE

    rows = torch.where(is_packed, packed_rows, tail_rows)
    return HeadRows(torch.where(valid, rows, 0), valid, positions, packed)


@triton.jit
def entry_rows(
    i,
    valid,
    lh,
    packed_len,
    fold_len,
    block_offset,
    tokens,
    pages,
    LH: tl.constexpr,
    S: tl.constexpr,
):
    """Return the int64 arena rows of entries `i` (int32 vector) of head `lh`.

    ``tokens`` and ``pages`` point at the request's rows of ``req_to_token`` and
    ``packed_pages``. Lanes that are not `valid` read nothing and give a row of page 0.
    """
    is_packed = i < packed_len
    ordinal = block_offset + i // S
    page = tl.load(pages + ordinal // LH, mask=valid & is_packed, other=0)
    token = tl.load(
        tokens + fold_len + i - packed_len, mask=valid & (i >= packed_len), other=0
    )
    page = tl.where(is_packed, page, token // S).to(tl.int64)
    in_page = tl.where(is_packed, ordinal % LH, lh)
    offset = tl.where(is_packed, i % S, token % S)
    return (page * LH + in_page) * S + offset


@triton.jit
def tile_rows(
    start,
    end,
    lh,
    packed_len,
    first_block,
    pages,
    tail_tokens,
    LH: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
):
    """[TILE] int64 arena rows of entries start .. start + TILE - 1 of head `lh`.

    `entry_rows` for a tile that begins at a page: packed_len and fold_len
    are multiples of S, so that one table cell serves S entries. `tail_tokens` points at
    the request's row of ``req_to_token``, fold_len - packed_len further on. Blocks that
    begin at `end` or later read nothing and lie in page 0.
    """
    entry = start + tl.arange(0, TILE // S) * S
    is_packed = entry < packed_len
    ordinal = first_block + entry // S
    cell = tl.where(is_packed, pages + ordinal // LH, tail_tokens + entry)
    index = tl.load(cell, mask=entry < end, other=0)
    page = tl.where(is_packed, index, index // S).to(tl.int64)
    block = page * LH + tl.where(is_packed, ordinal % LH, lh)
    row = block[:, None] * S + tl.arange(0, S)[None, :]
    return tl.reshape(row, [TILE])
