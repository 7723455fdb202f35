"""Block tables of every head, for attention kernels that take one page list a sequence.

A kernel that knows nothing of packed blocks can still read them when each (request,
KV head) is a sequence of its own and the arena is a cache of blocks [S, D]. Its page
list is the head's packed blocks, then its blocks of the tail's token pages.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``blocks``              [L, B, H, width]       int32 block of the j-th S entries of a
                                               head, 0 past its end
``lens``                [L, B, H]              int32 entries of a head
======================  =====================  =========================================
"""

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables


def head_tables_ref(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `head_tables`."""
    heads = tables.heads_per_page
    slots = slots.long()
    offsets = tables.block_offsets[slots].long()
    first, packed = offsets[:, :-1], offsets[:, 1:] - offsets[:, :-1]
    folds = tables.fold_lens[slots].long()
    tail_len = seq_lens.long() - folds
    tail = (tail_len + PAGE_SIZE - 1) // PAGE_SIZE

    j = torch.arange(width, device=slots.device)
    is_packed = j < packed[..., None]
    valid = j < (packed + tail[:, None])[..., None]
    ordinal = torch.where(is_packed, first[..., None] + j, 0)
    pages = tables.packed_pages[slots].long()
    page = pages.gather(1, (ordinal // heads).flatten(1)).view_as(ordinal)
    packed_block = page * heads + ordinal % heads

    position = folds[:, None, None] + PAGE_SIZE * (j - packed[..., None])
    position = torch.where(valid & ~is_packed, position, 0)
    token = tables.req_to_token[slots].long().gather(1, position.flatten(1))
    lh = torch.arange(heads, device=slots.device)[:, None]
    tail_block = token.view_as(position) // PAGE_SIZE * heads + lh

    blocks = torch.where(is_packed, packed_block, tail_block)
    blocks = torch.where(valid, blocks, 0).int()
    lens = (packed * PAGE_SIZE + tail_len[:, None]).int()
    split = (heads // num_kv_heads, num_kv_heads)
    return (
        blocks.unflatten(1, split).transpose(0, 1).contiguous(),
        lens.unflatten(1, split).transpose(0, 1).contiguous(),
    )


@triton.jit(do_not_specialize=["batch", "width"])
def head_tables_kernel(
    req_to_token,
    fold_lens,
    block_offsets,
    packed_pages,
    slots,
    seq_lens,
    blocks,
    lens,
    batch,
    width,
    token_table_stride,
    page_table_stride,
    L: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B, L * H, cdiv(width, BLOCK)): program (b, lh, y) writes BLOCK blocks of
    one head; (b, lh, 0) also its length.

    Pointers: tables as in ``layout``; slots, seq_lens [B]; blocks, lens as in the
    module docstring, contiguous. Every element is written by one program.
    """
    b = tl.program_id(0)
    lh = tl.program_id(1)
    heads: tl.constexpr = L * H
    slot = tl.load(slots + b).to(tl.int64)
    fold = tl.load(fold_lens + slot)
    first = tl.load(block_offsets + slot * (heads + 1) + lh)
    packed = tl.load(block_offsets + slot * (heads + 1) + lh + 1) - first
    tail_len = tl.load(seq_lens + b).to(tl.int32) - fold
    count = packed + (tail_len + S - 1) // S

    j = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_packed = j < packed
    ordinal = first + j
    page = tl.load(
        packed_pages + slot * page_table_stride + ordinal // heads,
        mask=is_packed,
        other=0,
    )
    in_tail = (j >= packed) & (j < count)
    token = tl.load(
        req_to_token + slot * token_table_stride + fold + (j - packed) * S,
        mask=in_tail,
        other=0,
    )
    block = tl.where(is_packed, page * heads + ordinal % heads, token // S * heads + lh)
    row = ((lh // H) * batch + b) * H + lh % H
    out = blocks + row.to(tl.int64) * width
    tl.store(out + j, tl.where(j < count, block, 0), mask=j < width)
    if tl.program_id(2) == 0:
        tl.store(lens + row, packed * S + tail_len)


def head_tables_triton(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `head_tables`."""
    batch, device = slots.shape[0], slots.device
    num_layers = tables.heads_per_page // num_kv_heads
    shape = (num_layers, batch, num_kv_heads)
    blocks = torch.empty(*shape, width, dtype=torch.int32, device=device)
    lens = torch.empty(shape, dtype=torch.int32, device=device)
    block = 128
    head_tables_kernel[(batch, tables.heads_per_page, -(-width // block))](
        tables.req_to_token,
        tables.fold_lens,
        tables.block_offsets,
        tables.packed_pages,
        slots,
        seq_lens,
        blocks,
        lens,
        batch,
        width,
        *tables.row_strides,
        L=num_layers,
        H=num_kv_heads,
        S=PAGE_SIZE,
        BLOCK=block,
        num_warps=4,
    )
    return blocks, lens


def head_tables(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page lists and lengths of all heads of some requests, for all layers at once.

    Parameters
    ----------
    tables : only read.
    slots, seq_lens : [B] int32 or int64; logical lengths.
    num_kv_heads : H.
    width : blocks of the longest list; at least what any head holds.

    Returns
    -------
    blocks, lens : see the module docstring.
    """
    op = head_tables_triton if use_triton(slots) else head_tables_ref
    return op(tables, slots, seq_lens, num_kv_heads=num_kv_heads, width=width)
