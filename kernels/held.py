"""Follow where in the text the survivors of a pass stand, and count who holds a token.

Positions are not stored with the KVs. For a request that asks for them they lie in a
vector beside its packed blocks, entry by entry, which each pass replaces: a survivor
that was packed takes its position along, one of the tail stands where its page does.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``rows``                [n] int32              arena row of each survivor, packed order
``page_ordinals``       [num_pages] int32      which page of the request a page is:
                                               packed ones first, then the folded tail's
``known``               [packed_pages * S *    position of each packed KV before the
                        L * H] int32           pass, in packed order
``positions``           [n] int32              position of each survivor
``holders``             [tokens] int32         heads that hold each of the first tokens
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.layout import PAGE_SIZE


class Held(NamedTuple):
    """What `follow_positions` returns; shapes in the module docstring."""

    positions: torch.Tensor
    holders: torch.Tensor


def page_ordinals(pages: torch.Tensor, num_pages: int) -> torch.Tensor:
    """Invert a request's list of pages, int64; cells of other pages are not written."""
    ordinals = torch.empty(num_pages, dtype=torch.int32, device=pages.device)
    ordinals[pages] = torch.arange(len(pages), dtype=torch.int32, device=pages.device)
    return ordinals


def follow_positions_ref(
    rows: torch.Tensor,
    page_ordinals: torch.Tensor,
    known: torch.Tensor,
    *,
    fold_old: int,
    fold_new: int,
    tokens: int,
    heads_per_page: int,
) -> Held:
    """Plain torch form of `follow_positions`."""
    page_cells = PAGE_SIZE * heads_per_page
    page, in_page = rows.long() // page_cells, rows.long() % page_cells
    cell = page_ordinals[page].long() * page_cells + in_page
    tail = (cell - len(known)) // page_cells * PAGE_SIZE + rows % PAGE_SIZE + fold_old
    positions = tail.int()
    if len(known):
        packed = known[cell.clamp(max=len(known) - 1)]
        positions = torch.where(cell < len(known), packed, positions)
    # What lies behind the last token counted goes to a cell of its own.
    counted = positions.long().clamp(max=tokens)
    holders = torch.zeros(tokens + 1, dtype=torch.int32, device=rows.device)
    holders.scatter_add_(0, counted, torch.ones_like(positions))
    holders[fold_new:] = heads_per_page
    return Held(positions, holders[:tokens])


@triton.jit(do_not_specialize=["n", "packed_pages", "fold_old", "tokens"])
def follow_kernel(
    rows,
    page_ordinals,
    known,
    positions,
    holders,
    n,
    packed_pages,
    fold_old,
    tokens,
    LH: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (cdiv(n, BLOCK)): program x follows survivors [x, x + 1) * BLOCK.

    Pointers as in the module docstring; `holders` is counted up atomically. `known` is
    read below ``packed_pages`` pages only.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = m < n
    row = tl.load(rows + m, mask=ok, other=0)
    block = row // S
    ordinal = tl.load(page_ordinals + block // LH, mask=ok, other=0)
    is_packed = ordinal < packed_pages
    cell = (ordinal.to(tl.int64) * LH + block % LH) * S + row % S
    before = tl.load(known + cell, mask=ok & is_packed, other=0)
    position = fold_old + (ordinal - packed_pages) * S + row % S
    position = tl.where(is_packed, before, position)
    tl.store(positions + m, position, mask=ok)
    tl.atomic_add(holders + position, 1, mask=ok & (position < tokens))


def follow_positions_triton(
    rows: torch.Tensor,
    page_ordinals: torch.Tensor,
    known: torch.Tensor,
    *,
    fold_old: int,
    fold_new: int,
    tokens: int,
    heads_per_page: int,
) -> Held:
    """Triton form of `follow_positions`; one launch."""
    block, n = 1024, len(rows)
    holders = torch.zeros(tokens, dtype=torch.int32, device=rows.device)
    positions = torch.empty_like(rows)
    if n:
        follow_kernel[(-(-n // block),)](
            rows,
            page_ordinals,
            # An empty tensor has no address.
            known if len(known) else positions,
            positions,
            holders,
            n,
            len(known) // (PAGE_SIZE * heads_per_page),
            fold_old,
            tokens,
            LH=heads_per_page,
            S=PAGE_SIZE,
            BLOCK=block,
            num_warps=4,
        )
    holders[fold_new:] = heads_per_page
    return Held(positions, holders)


def follow_positions(
    rows: torch.Tensor,
    page_ordinals: torch.Tensor,
    known: torch.Tensor,
    *,
    fold_old: int,
    fold_new: int,
    tokens: int,
    heads_per_page: int,
) -> Held:
    """Find where the survivors of one request stand, and who holds its first tokens.

    Parameters
    ----------
    rows, page_ordinals, known : see the module docstring; only read.
    fold_old, fold_new : packed logical tokens before and after the pass; what lies
        behind them is held by every head.
    tokens : how many of the first tokens are counted.
    heads_per_page : L * H.

    Returns
    -------
    Held : new tensors.
    """
    op = follow_positions_triton if use_triton(rows) else follow_positions_ref
    return op(
        rows,
        page_ordinals,
        known,
        fold_old=fold_old,
        fold_new=fold_new,
        tokens=tokens,
        heads_per_page=heads_per_page,
    )
