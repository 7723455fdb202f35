"""The plan of decode attention: who works on which tiles, for all layers of a step.

With T tiles in a layer and P programs, a share is ceil(T / P) tiles, at least
min_share, and with `DecodeConfig.max_parts` = m also at least the smaller of
ceil(longest row / m) and ceil(T / multiprocessors): s. With `DecodeConfig.row_slack` =
a, a layer of at most P rows, and of one chunk of the prefix sum, is *aligned* if a
share u in s .. s + a needs no more than P programs when each row is rounded up to whole
shares; the smallest u is taken:

    sum over rows of ceil(tiles / u) <= P

Its ``cu_tiles`` count the rounded rows, so that every share begins and ends with a row
or inside it. The attention kernel needs no other change: it stops at a row's entries.

What the plan holds, `DecodeWorkspace` lists.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.decode_rows import (
    ENTRIES,
    RECORD,
    row_extent,
    row_record,
    store_record,
    store_start,
)
from sglang_kvc.kernels.decode_schedule import (
    DecodeConfig,
    DecodeWorkspace,
    check_programs,
    check_workspace,
    default_config,
    num_programs,
)
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables
from sglang_kvc.kernels.query_ring import QueryRing, ring_page

# Rows that one round of the plan's prefix sum takes.
_PLAN_CHUNK = 1024


class DecodePlan(NamedTuple):
    """The parts of a `DecodeWorkspace` that a plan fills, without spare rows.

    Attributes
    ----------
    cu_tiles : [L, B * H + 1] int32.
    shares : [L] int32.
    program_records : [L, programs, 8] int32; of row B * H - 1 for a program without a
        tile.
    row_records : [L, B * H, 5] int32, the fields in use.
    ring_pages : [B] int32.
    """

    cu_tiles: torch.Tensor
    shares: torch.Tensor
    program_records: torch.Tensor
    row_records: torch.Tensor
    ring_pages: torch.Tensor


def plan_decode_ref(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    programs: int,
    config: DecodeConfig,
    query_ring: QueryRing | None = None,
    rows_per_block: int = 1,
) -> DecodePlan:
    """Plain torch form of `plan_decode_triton`; rows_per_block : R of the ring."""
    slots, rows = slots.long(), len(slots) * num_kv_heads
    num_layers = tables.heads_per_page // num_kv_heads

    def by_row(values: torch.Tensor) -> torch.Tensor:
        # [B, L * H] -> [L, B * H]: requests, and within a request its heads.
        parts = values.view(len(slots), num_layers, num_kv_heads)
        return parts.transpose(0, 1).reshape(num_layers, rows)

    folds = tables.fold_lens[slots].long()
    offsets = tables.block_offsets[slots].long()
    packed = offsets.diff(dim=1) * PAGE_SIZE
    entries = packed + (seq_lens.long() - folds)[:, None]
    same = torch.ones_like(packed)
    fields = [slots[:, None] * same, offsets[:, :-1], packed, folds[:, None] * same]
    row_records = torch.stack([by_row(field) for field in [*fields, entries]], -1)

    tiles = (-(-row_records[..., ENTRIES.value] // config.tile)).clamp(min=1)
    total = tiles.sum(1)
    shares = (-(-total // programs)).clamp(min=config.min_share)
    if config.max_parts is not None:
        parts = -(-tiles.amax(1) // config.max_parts)
        spread = -(-total // (programs // config.programs_per_sm))
        shares = shares.maximum(parts.minimum(spread))
    widths = 0 if config.row_slack is None else config.row_slack + 1
    widths *= rows <= min(_PLAN_CHUNK, programs)
    for layer in range(num_layers):
        for share in range(int(shares[layer]), int(shares[layer]) + widths):
            whole = -(-tiles[layer] // share)
            if whole.sum() <= programs:
                tiles[layer], shares[layer] = whole * share, share
                break
    cu_tiles = torch.nn.functional.pad(tiles.cumsum(1), (1, 0))
    first_tile = torch.arange(programs, device=slots.device) * shares[:, None]
    first_rows = torch.searchsorted(
        cu_tiles[:, 1:].contiguous(), first_tile, right=True
    ).clamp(max=rows - 1)
    first_end = (cu_tiles.gather(1, first_rows), cu_tiles.gather(1, first_rows + 1))
    own = row_records[torch.arange(num_layers)[:, None], first_rows]
    program_records = torch.cat([own, torch.stack([*first_end, first_rows], -1)], -1)
    pages = torch.zeros_like(slots)
    if query_ring is not None:
        in_ring = (seq_lens.long() - 1) % query_ring.window
        pages = query_ring.pages[slots, in_ring // (2 * rows_per_block)]
    plan = (cu_tiles, shares, program_records, row_records, pages)
    return DecodePlan(*(part.int() for part in plan))


@triton.jit(
    do_not_specialize=[
        "cu_stride",
        "planned_programs",
        "records_stride",
        "num_rows",
        "search_steps",
    ]
)
def decode_plan_kernel(
    fold_lens,
    block_offsets,
    slots,
    seq_lens,
    ring,
    cu_tiles,
    shares,
    records,
    ring_pages,
    cu_stride,
    planned_programs,
    records_stride,
    num_rows,
    search_steps,
    LH: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    NUM_SMS: tl.constexpr,
    ROW_SLACK: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (L,): program l plans layer l and writes nothing else, but program 0 also
    ring_pages.

    Pointers: tables as in ``layout``; slots and seq_lens [B]; ring the pages of a
    `QueryRing` or None; cu_tiles, shares, records and ring_pages as in
    `DecodeWorkspace`, of at least num_rows rows and planned_programs >= NUM_PROGRAMS
    programs. A program without a tile has row num_rows - 1.
    search_steps = ceil(log2(num_rows)); PP is NUM_PROGRAMS rounded up to a power of
    two.
    """
    layer = tl.program_id(0)
    cu = cu_tiles + layer * cu_stride
    own = records + layer * records_stride
    row_records = own + planned_programs * RECORD
    lane = tl.arange(0, CHUNK)
    total = 0
    longest = 0
    tiles = tl.zeros([CHUNK], tl.int32)
    for start in range(0, num_rows, CHUNK):
        row = start + lane
        ok = row < num_rows
        slot, first_block, packed_len, fold_len, n = row_extent(
            row, ok, layer, fold_lens, block_offsets, slots, seq_lens, LH, H, S
        )
        record = row_records + row * RECORD
        store_record(record, slot, first_block, packed_len, fold_len, n, ok)
        once = ok & (layer == 0) & (row % H == 0)
        page = tl.zeros([CHUNK], tl.int32)
        if ring is not None:
            row_in_ring = (fold_len + n - packed_len - 1) % W
            page = ring_page(ring, slot, row_in_ring, once, R, N)
        tl.store(ring_pages + row // H, page, mask=once)
        # Every row has a tile, so that the attention kernel visits and writes it.
        tiles = tl.where(ok, tl.maximum(tl.cdiv(n, TILE), 1), 0)
        tl.store(cu + 1 + row, total + tl.cumsum(tiles, 0), mask=ok)
        total += tl.sum(tiles, 0)
        if MAX_PARTS is not None:
            longest = tl.maximum(longest, tl.max(tiles, 0))
    share = tl.maximum(tl.cdiv(total, NUM_PROGRAMS), MIN_SHARE)
    if MAX_PARTS is not None:
        parts = tl.cdiv(longest, MAX_PARTS)
        share = tl.maximum(share, tl.minimum(parts, tl.cdiv(total, NUM_SMS)))
    if ROW_SLACK is not None and num_rows <= min(CHUNK, NUM_PROGRAMS):
        # One chunk: `tiles` holds all rows.
        aligned = 0
        for i in tl.static_range(ROW_SLACK + 1):
            wider = share + ROW_SLACK - i
            needed = tl.sum(tl.cdiv(tiles, wider), 0)
            aligned = tl.where(needed <= NUM_PROGRAMS, wider, aligned)
        # The same cells are written again, perhaps by other threads.
        tl.debug_barrier()
        if aligned > 0:
            share = aligned
            whole = tl.cumsum(tl.cdiv(tiles, share), 0) * share
            tl.store(cu + 1 + lane, whole, mask=lane < num_rows)
    tl.store(shares + layer, share)
    tl.store(cu, 0)
    # The lanes of the search read what other threads wrote.
    tl.debug_barrier()

    p = tl.arange(0, PP)
    is_program = p < NUM_PROGRAMS
    tile = p * share
    # The last row that begins at `tile` or before: in [low, high).
    low = tl.zeros([PP], tl.int32)
    high = low + num_rows
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = tl.load(cu + middle) <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    begin = row_record(row_records + low * RECORD)
    record = own + p * RECORD
    store_record(record, *begin, is_program)
    store_start(record, tl.load(cu + low), tl.load(cu + low + 1), low, is_program)


def plan_decode_triton(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    num_kv_heads: int,
    config: DecodeConfig | None = None,
    query_ring: QueryRing | None = None,
) -> None:
    """Fill the plan of all layers in one launch.

    Parameters
    ----------
    tables : only read, and of them only the lengths.
    slots, seq_lens : [B] int32 or int64, as in `decode_attention`.
    workspace : from `make_decode_workspace`.
    num_kv_heads : H.
    config : default of the workspace's shape.
    query_ring : only its pages are read; without it no queries are recorded.
    """
    batch, heads = slots.shape[0], num_kv_heads
    num_layers = tables.heads_per_page // heads
    check_workspace(workspace, batch, num_layers, heads)
    _, group, head_dim = workspace.partial_out.shape
    config = config or default_config(head_dim, group)
    programs = num_programs(config, slots.device)
    check_programs(workspace, programs)
    rows = batch * heads
    ring, sizes = None, {"W": 1, "R": 1, "N": 1}
    if query_ring is not None:
        ring, sizes = query_ring.pages, query_ring.sizes(group, head_dim)
        # Where a row lies in its page does not matter here.
        del sizes["B"]
    decode_plan_kernel[(num_layers,)](
        tables.fold_lens,
        tables.block_offsets,
        slots,
        seq_lens,
        ring,
        workspace.cu_tiles,
        workspace.shares,
        workspace.records,
        workspace.ring_pages,
        workspace.cu_tiles.stride(0),
        workspace.programs,
        workspace.records.stride(0),
        rows,
        max(rows - 1, 0).bit_length(),
        LH=tables.heads_per_page,
        H=heads,
        S=PAGE_SIZE,
        **sizes,
        TILE=config.tile,
        MIN_SHARE=config.min_share,
        MAX_PARTS=config.max_parts,
        NUM_SMS=programs // config.programs_per_sm,
        ROW_SLACK=config.row_slack,
        NUM_PROGRAMS=programs,
        PP=triton.next_power_of_2(programs),
        CHUNK=_PLAN_CHUNK,
        num_warps=8,
        # Left to itself ptxas takes 48 and spills.
        maxnreg=128,
    )
