"""Follow where in the text the survivors of passes stand, and count who holds a token.

Positions are not stored with the KVs. For a request that asks for them they lie in a
vector beside its packed blocks, entry by entry, which each pass replaces: a survivor
that was packed takes its position along, one of the tail stands where its page does.

A call serves all requests of a plan that ask. A page that two of them read must stand
at the same position of both tails, as pages of the prefix tree do. No packed page is
shared: requests that ask start from no snapshot.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``rows``                [plan.num_kept] int32  arena row of each survivor, packed order
``pages``               [P] int64              pages with a request's packed KVs
``positions``           [P * S * L * H] int32  position of each, in packed order
``holders``             [tokens] int32         heads that hold each of the first tokens,
                                               request after request
``shares``              [tokens] int16         the same in thousandths of all heads
======================  =====================  =========================================
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.held_kernels import (
    follow_kernel,
    mark_kernel,
    thousandths_kernel,
)
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables

BLOCK = 1024


class KeptPositions(NamedTuple):
    """Where the packed KVs of a request stand; shapes in the module docstring."""

    pages: torch.Tensor
    positions: torch.Tensor


class FollowedRequest(NamedTuple):
    """A request of a plan whose survivors are followed.

    Attributes
    ----------
    slot, fold_old, fold_new : as in `PassPlan`; the tail before the pass still stands
        in the slot's row of ``req_to_token``.
    tokens : how many of its first tokens are counted.
    keep_base, kept : its first survivor in ``rows``, and their number.
    before : of what was packed before the pass; None at the first one.
    """

    slot: int
    fold_old: int
    fold_new: int
    tokens: int
    keep_base: int
    kept: int
    before: KeptPositions | None = None

    @property
    def packed_pages(self) -> int:
        """Pages that were packed before the pass."""
        return 0 if self.before is None else len(self.before.pages)

    @property
    def pages(self) -> int:
        """Pages that survivors may come from."""
        return self.packed_pages + (self.fold_new - self.fold_old) // PAGE_SIZE


class Held(NamedTuple):
    """What `follow_positions` returns; shapes in the module docstring.

    Attributes
    ----------
    positions : of each request, a tensor of its own.
    holders : of all requests.
    """

    positions: tuple[torch.Tensor, ...]
    holders: torch.Tensor


def follow_positions_ref(
    tables: BlockTables,
    rows: torch.Tensor,
    requests: Sequence[FollowedRequest],
    *,
    num_pages: int,
) -> Held:
    """Plain torch form of `follow_positions`; one request at a time."""
    positions, holders = [], [torch.empty(0, dtype=torch.int32, device=rows.device)]
    for request in requests:
        own = rows[request.keep_base : request.keep_base + request.kept].long()
        stand = _positions_ref(tables, own, request, num_pages)
        positions.append(stand)
        # What lies behind the last token counted goes to a cell of its own.
        counted = stand.long().clamp(max=request.tokens)
        count = torch.zeros(request.tokens + 1, dtype=torch.int32, device=rows.device)
        count.scatter_add_(0, counted, torch.ones_like(stand))
        count[request.fold_new :] = tables.heads_per_page
        holders.append(count[:-1])
    return Held(tuple(positions), torch.cat(holders))


def _positions_ref(
    tables: BlockTables, rows: torch.Tensor, request: FollowedRequest, num_pages: int
) -> torch.Tensor:
    """[n] int32: where the survivors of one request stand; `rows` are its own."""
    folded = slice(request.fold_old, request.fold_new, PAGE_SIZE)
    tail = tables.req_to_token[request.slot, folded].long() // PAGE_SIZE
    nothing = KeptPositions(tail[:0], tail[:0].int())
    pages, known = request.before or nothing
    # Which page of the request a page is: packed ones first, then the folded tail's.
    ordinals = torch.empty(num_pages, dtype=torch.int64, device=rows.device)
    listed = torch.cat([pages, tail])
    ordinals[listed] = torch.arange(len(listed), device=rows.device)

    page_cells = PAGE_SIZE * tables.heads_per_page
    cell = ordinals[rows // page_cells] * page_cells + rows % page_cells
    behind = (cell - len(known)) // page_cells * PAGE_SIZE
    positions = (request.fold_old + behind + rows % PAGE_SIZE).int()
    if len(known):
        packed = known[cell.clamp(max=len(known) - 1)]
        positions = torch.where(cell < len(known), packed, positions)
    return positions


def follow_positions_triton(
    tables: BlockTables,
    rows: torch.Tensor,
    requests: Sequence[FollowedRequest],
    *,
    num_pages: int,
) -> Held:
    """Triton form of `follow_positions`; one copy to the device and two launches."""
    ints = {"dtype": torch.int32, "device": rows.device}
    axes = {"LH": tables.heads_per_page, "S": PAGE_SIZE, "BLOCK": BLOCK, "num_warps": 4}
    positions = tuple(torch.empty(request.kept, **ints) for request in requests)
    holders = torch.empty(sum(request.tokens for request in requests), **ints)
    table = _table(requests, positions, rows.device)
    marks = torch.empty(num_pages, **ints)
    longest = max((max(it.pages, it.tokens) for it in requests), default=0)
    if longest:
        mark_kernel[(-(-longest // BLOCK), len(requests))](
            tables.req_to_token,
            table,
            marks,
            holders,
            tables.req_to_token.stride(0),
            **axes,
        )
    most = max((request.kept for request in requests), default=0)
    if most:
        follow_kernel[(-(-most // BLOCK), len(requests))](
            rows, table, marks, holders, **axes
        )
    return Held(positions, holders)


def _table(
    requests: Sequence[FollowedRequest],
    positions: Sequence[torch.Tensor],
    device: torch.device,
) -> torch.Tensor:
    """[R, 11] int64 on the device: what the kernels know of each request.

    Copied without waiting, from pinned memory that the caching host allocator keeps
    until the copy has run. The vectors behind the addresses are safe as arguments of a
    kernel are: memory that is freed goes to later launches of the same stream.
    """
    table, first = [], 0
    for request, own in zip(requests, positions, strict=True):
        addresses = (0, 0)
        if request.before is not None:
            pages, known = request.before
            addresses = pages.data_ptr(), known.data_ptr()
        # In the order of `request_row`.
        table.append(
            (
                request.slot,
                request.fold_old,
                request.fold_new,
                request.tokens,
                first,
                request.keep_base,
                request.kept,
                request.packed_pages,
                *addresses,
                own.data_ptr(),
            )
        )
        first += request.tokens
    host = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def follow_positions(
    tables: BlockTables,
    rows: torch.Tensor,
    requests: Sequence[FollowedRequest],
    *,
    num_pages: int,
) -> Held:
    """Find where the survivors of requests stand, and who holds their first tokens.

    Parameters
    ----------
    tables : only ``req_to_token`` is read.
    rows : of all survivors of a plan; only read.
    requests : those of the plan that are followed; what is before them is only read.
    num_pages : pages of the arena.

    Returns
    -------
    Held : new tensors. What lies behind ``fold_new`` is held by every head.
    """
    op = follow_positions_triton if use_triton(rows) else follow_positions_ref
    return op(tables, rows, requests, num_pages=num_pages)


def thousandths_ref(by_rank: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Plain torch form of `thousandths`."""
    return ((by_rank.sum(1) * 1000 + heads // 2) // heads).to(torch.int16)


def thousandths_triton(by_rank: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Triton form of `thousandths`; one launch."""
    n, ranks = by_rank.shape
    shares = torch.empty(n, dtype=torch.int16, device=by_rank.device)
    if n:
        thousandths_kernel[(-(-n // BLOCK),)](
            by_rank, shares, n, ranks, heads, BLOCK=BLOCK, num_warps=4
        )
    return shares


def thousandths(by_rank: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Sum the heads that hold a token over the ranks, as ``shares`` of all `heads`.

    Parameters
    ----------
    by_rank : [tokens, ranks] int32, contiguous; only read.
    heads : of all ranks, L * H each. Halves are rounded up.
    """
    op = thousandths_triton if use_triton(by_rank) else thousandths_ref
    return op(by_rank, heads=heads)
