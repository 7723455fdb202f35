"""How decode attention splits its work: configuration, workspace and plan.

A row is (request, KV head), row = b * H + h, with n = S * packed blocks + seq_len -
fold_len entries, cut into max(1, ceil(n / tile)) tiles. Every program of the attention
kernel takes share = max(min_share, ceil(total / programs)) consecutive tiles of the
layer's concatenated rows (``decode_kernels``). The number of programs depends on the
device alone, never on lengths: a CUDA graph replays what it captured, and the plan,
made on the device, follows the lengths.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.decode_kernels import row_extent, tile_share
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables

# Multiprocessors of an H100 or H200, assumed where there is no GPU.
_DEFAULT_SMS = 132
# Rows that one round of the plan's prefix sum takes.
_PLAN_CHUNK = 1024


class DecodeConfig(NamedTuple):
    """What may be tuned. Plan and attention of one step need the same values.

    Attributes
    ----------
    tile : entries a tile, a power of two, at least 16.
    num_warps, num_stages : of the attention kernel; fewer stages where the tiles of
        K and V would not fit in shared memory. Pages are looked up as far ahead of K
        and V as these are loaded ahead of use: (num_stages - 1) // 2 tiles.
    max_registers : a thread may use, None: as many as the compiler likes.
    programs_per_sm : programs a multiprocessor.
    min_share : fewest tiles a program takes, so that short batches are merged less.
    """

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3
    min_share: int = 1
    max_registers: int | None = None


# By head_dim rounded up to a power of two.
_CONFIGS = {64: DecodeConfig(), 128: DecodeConfig()}


def default_config(head_dim: int) -> DecodeConfig:
    """Return the tuned configuration of a head_dim."""
    return _CONFIGS.get(triton.next_power_of_2(head_dim), DecodeConfig())


@lru_cache
def _num_sms(device: torch.device) -> int:
    if not torch.cuda.is_available():
        return _DEFAULT_SMS
    # "cpu" and "meta" tensors stand in for the current GPU.
    gpu = device if device.type == "cuda" else torch.device("cuda")
    return torch.cuda.get_device_properties(gpu).multi_processor_count


def num_programs(config: DecodeConfig, device: torch.device | str) -> int:
    """Programs of the attention kernel on this device."""
    return config.programs_per_sm * _num_sms(torch.device(device))


class DecodeWorkspace(NamedTuple):
    """Scratch of all layers and steps; its addresses are static. P programs, R rows.

    Attributes
    ----------
    cu_tiles : [L, R + 1] int32, the plan: exclusive prefix sum of the rows' tiles.
    first_rows : [L, P] int32, the plan: row of each program's first tile.
    partial_out : [2 P, Hq / H, D] fp32, sum of 2 ** (logit - max) V over a part of a
        row, not yet divided by ...
    partial_mass : [2 P, Hq / H] fp32, the sum of 2 ** (logit - max).
    partial_max : [2 P, Hq / H] fp32, the largest logit, times log2(e).
    arrivals : [R] int32, parts of each row stored so far; 0 between launches.
    """

    cu_tiles: torch.Tensor
    first_rows: torch.Tensor
    partial_out: torch.Tensor
    partial_mass: torch.Tensor
    partial_max: torch.Tensor
    arrivals: torch.Tensor


def make_decode_workspace(
    max_batch: int,
    num_qo_heads: int,
    head_dim: int,
    device: torch.device | str,
    num_kv_heads: int = 1,
    num_layers: int = 1,
    config: DecodeConfig | None = None,
) -> DecodeWorkspace:
    """Allocate what plans and partial results of up to `max_batch` requests need.

    Parameters
    ----------
    max_batch : B of the largest call.
    num_qo_heads, num_kv_heads : Hq and H on this rank.
    head_dim, device, num_layers : as in the arena; "meta" serves to count bytes.
    config : default of `head_dim`; the one with the most programs of those to be used.

    Returns
    -------
    DecodeWorkspace : at Hq = 32, H = 8, D = 128, B = 256, L = 32 and 528 programs,
        2.5 MB.
    """
    config = config or default_config(head_dim)
    programs = num_programs(config, device)
    rows, group = max_batch * num_kv_heads, num_qo_heads // num_kv_heads
    ints = {"dtype": torch.int32, "device": device}
    floats = {"dtype": torch.float32, "device": device}
    return DecodeWorkspace(
        torch.empty(num_layers, rows + 1, **ints),
        torch.empty(num_layers, programs, **ints),
        torch.empty(2 * programs, group, head_dim, **floats),
        torch.empty(2 * programs, group, **floats),
        torch.empty(2 * programs, group, **floats),
        torch.zeros(rows, **ints),
    )


def check_workspace(
    workspace: DecodeWorkspace, batch: int, num_layers: int, num_kv_heads: int
) -> None:
    """Raise ValueError if a batch does not fit."""
    layers, rows = workspace.cu_tiles.shape[0], workspace.arrivals.shape[0]
    if rows < batch * num_kv_heads or layers < num_layers:
        raise ValueError(
            f"workspace holds {layers} layers of {rows} rows, this batch needs "
            f"{num_layers} of {batch * num_kv_heads}: make it with max_batch >= "
            f"{batch}, num_kv_heads={num_kv_heads} and num_layers={num_layers}"
        )


def check_programs(workspace: DecodeWorkspace, programs: int) -> None:
    """Raise ValueError if the configuration runs more programs than planned for."""
    if workspace.first_rows.shape[1] < programs:
        raise ValueError(
            f"workspace is for {workspace.first_rows.shape[1]} programs, not "
            f"{programs}: make it with the same config"
        )


@triton.jit(do_not_specialize=["cu_stride", "first_stride", "num_rows", "search_steps"])
def decode_plan_kernel(
    fold_lens,
    block_offsets,
    slots,
    seq_lens,
    cu_tiles,
    first_rows,
    cu_stride,
    first_stride,
    num_rows,
    search_steps,
    LH: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (L,): program l plans layer l.

    Pointers: tables, slots and seq_lens as in the attention kernel; cu_tiles
    [L, >= num_rows + 1] int32, exclusive prefix sum of the rows' tiles; first_rows
    [L, >= NUM_PROGRAMS] int32, the row that holds the first tile of each program's
    share (num_rows - 1 for a program without one). search_steps =
    ceil(log2(num_rows)); PP is NUM_PROGRAMS rounded up to a power of two. Each program
    writes its own layer only.
    """
    layer = tl.program_id(0)
    cu = cu_tiles + layer * cu_stride
    lane = tl.arange(0, CHUNK)
    total = 0
    for start in range(0, num_rows, CHUNK):
        row = start + lane
        ok = row < num_rows
        _, _, _, _, n = row_extent(
            row, ok, layer, fold_lens, block_offsets, slots, seq_lens, LH, H, S
        )
        # Every row has a tile, so that the attention kernel visits and writes it.
        tiles = tl.where(ok, tl.maximum(tl.cdiv(n, TILE), 1), 0)
        tl.store(cu + 1 + row, total + tl.cumsum(tiles, 0), mask=ok)
        total += tl.sum(tiles, 0)
    tl.store(cu, 0)
    # The lanes of the search read what other threads wrote.
    tl.debug_barrier()

    p = tl.arange(0, PP)
    tile = p * tile_share(total, MIN_SHARE, NUM_PROGRAMS)
    # The last row that begins at `tile` or before: in [low, high).
    low = tl.zeros([PP], tl.int32)
    high = low + num_rows
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = tl.load(cu + middle) <= tile
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    tl.store(first_rows + layer * first_stride + p, low, mask=p < NUM_PROGRAMS)


def plan_decode_ref(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    num_layers: int,
    num_kv_heads: int,
    programs: int,
    config: DecodeConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `plan_decode_triton`.

    Returns
    -------
    cu_tiles : [L, B * H + 1] int32.
    first_rows : [L, programs] int32; B * H - 1 for a program without a tile.
    """
    slots = slots.long()
    tail = seq_lens.long() - tables.fold_lens[slots]
    blocks = tables.block_offsets[slots].long().diff(dim=1)
    entries = (blocks * PAGE_SIZE + tail[:, None]).view(len(slots), num_layers, -1)
    # Rows of one layer: requests, and within a request its heads.
    rows = entries.transpose(0, 1).reshape(num_layers, len(slots) * num_kv_heads)
    tiles = (-(-rows // config.tile)).clamp(min=1)
    cu_tiles = torch.nn.functional.pad(tiles.cumsum(1), (1, 0))
    share = (-(-cu_tiles[:, -1:] // programs)).clamp(min=config.min_share)
    first_tile = torch.arange(programs, device=slots.device) * share
    first_rows = torch.searchsorted(
        cu_tiles[:, 1:].contiguous(), first_tile, right=True
    )
    return cu_tiles.int(), first_rows.clamp(max=rows.shape[1] - 1).int()


def plan_decode_triton(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    num_layers: int,
    num_kv_heads: int,
    workspace: DecodeWorkspace,
    config: DecodeConfig | None = None,
) -> None:
    """Fill `cu_tiles` and `first_rows` of all layers in one launch.

    Parameters
    ----------
    tables : only read, and of them only the lengths.
    slots, seq_lens : [B] int32 or int64, as in `decode_attention`.
    num_layers, num_kv_heads : L and H of the arena.
    workspace : from `make_decode_workspace`.
    config : default of the workspace's head_dim.
    """
    batch, heads = slots.shape[0], num_kv_heads
    check_workspace(workspace, batch, num_layers, heads)
    config = config or default_config(workspace.partial_out.shape[-1])
    programs = num_programs(config, slots.device)
    check_programs(workspace, programs)
    rows = batch * heads
    decode_plan_kernel[(num_layers,)](
        tables.fold_lens,
        tables.block_offsets,
        slots,
        seq_lens,
        workspace.cu_tiles,
        workspace.first_rows,
        workspace.cu_tiles.stride(0),
        workspace.first_rows.stride(0),
        rows,
        max(rows - 1, 0).bit_length(),
        LH=num_layers * heads,
        H=heads,
        S=PAGE_SIZE,
        TILE=config.tile,
        MIN_SHARE=config.min_share,
        NUM_PROGRAMS=programs,
        PP=triton.next_power_of_2(programs),
        CHUNK=_PLAN_CHUNK,
        num_warps=8,
    )
