"""Configuration and workspace of decode attention: how it splits its work.

A row is (request, KV head), row = b * H + h, with n = S * packed blocks + seq_len -
fold_len entries, cut into max(1, ceil(n / tile)) tiles. Every program of the attention
kernel takes a *share*, as many consecutive tiles as every other, of the layer's
concatenated rows (``decode_kernels``). The number of programs depends on the device
alone, never on lengths: a CUDA graph replays what it captured, and the plan, made on
the device (``decode_plan``), follows the lengths.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.decode_rows import RECORD

# Multiprocessors of an H100 or H200, assumed where there is no GPU.
_DEFAULT_SMS = 132


class DecodeConfig(NamedTuple):
    """Tuned values; plan and attention of one step need the same ones.

    Attributes
    ----------
    tile : entries a tile, a power of two, at least 16.
    num_warps, num_stages : of the attention kernel; fewer stages where the tiles of
        K and V would not fit in shared memory. Pages are looked up as far ahead of K
        and V as these are loaded ahead of use: (num_stages - 1) // 2 tiles.
    max_registers : a thread may use, None: as many as the compiler likes.
    programs_per_sm : programs a multiprocessor.
    min_share : fewest tiles a program takes, so that short batches are merged less.
    max_parts : programs, about, that share the longest row, while no multiprocessor
        goes idle for it: one program merges all parts of a row. None: no limit.
    row_slack : tiles by which a share may grow for all shares to begin and end with
        rows: then a program works on one row and waits once for tables and query.
        None: the shares are never aligned.
    merge_values : fp32 values that a round of the merge holds, over all threads, in at
        most 16 parts; a power of two. More: fewer rounds that wait for memory, and
        more registers, which the attention loop does without.
    """

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3
    min_share: int = 1
    max_registers: int | None = None
    max_parts: int | None = 16
    row_slack: int | None = 1
    merge_values: int = 4096


# Three programs fit on a multiprocessor with up to 168 registers a thread. Some shapes
# need more: two programs then, which load further ahead (times: docs/benchmarks.md).
# What the limit makes the compiler spill costs less than a third program gains. Merges
# take few rounds, as far as their registers do not spill.
_NARROW = DecodeConfig(num_stages=5, max_registers=168)
_THREE = DecodeConfig(max_registers=168, merge_values=8192)
_TWO = DecodeConfig(num_stages=5, programs_per_sm=2, merge_values=16384)
_LARGE_GROUP = _TWO._replace(merge_values=8192)
_WIDE = _TWO._replace(merge_values=4096)
_GROUPS_OF_THREE = range(2, 5)
# Bytes: two tiles ahead are as much on its way as one tile of bf16.
_BYTE_STAGES = 5


def default_config(
    head_dim: int, group: int = 4, *, byte_cells: bool = False
) -> DecodeConfig:
    """Return the tuned configuration of a shape.

    Parameters
    ----------
    head_dim, group : D and Hq / H.
    byte_cells : whether K and V are e4m3. The plan is the same.
    """
    lanes = triton.next_power_of_2(head_dim)
    if lanes <= 64:
        config = _NARROW
    elif lanes > 128:
        config = _WIDE
    elif group in _GROUPS_OF_THREE:
        config = _THREE
    else:
        config = _TWO if group <= 8 else _LARGE_GROUP
    return config._replace(num_stages=_BYTE_STAGES) if byte_cells else config


# KiB a program may use, by compute capability (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); of others as little as any of them has.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


@lru_cache
def shared_memory() -> int:
    """Bytes of shared memory that a program may use on the GPU compiled for."""
    try:
        arch = triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        # No GPU: the interpreter has no limit.
        arch = 90
    return _SHARED_KIB.get(arch, min(_SHARED_KIB.values())) * 1024


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
    cu_tiles : [L, R + 1] int32, the plan: exclusive prefix sum of the rows' tiles, in
        an aligned layer each rounded up to whole shares.
    shares : [L] int32, the plan: tiles a program.
    records : [L, P + R, RECORD] int32, the plan: where a row lies, without the tables,
        whose loads would wait for each other; cells as in ``decode_rows``. First of the
        P rows that programs begin in, then of all R rows, without the tiles.
    partial_out : [2 P, Hq / H, D] fp32, sum of 2 ** (logit - max) V over a part of a
        row, not yet divided by ...
    partial_mass : [2 P, Hq / H] fp32, the sum of 2 ** (logit - max).
    partial_max : [2 P, Hq / H] fp32, the largest logit, times log2(e).
    arrivals : [R] int32, parts of each row stored so far; 0 between launches.
    ring_pages : [B] int32, the plan: page of the query ring that the new query of each
        request goes to, 0: none. Neither layer nor head matters, so no record has it.
    """

    cu_tiles: torch.Tensor
    shares: torch.Tensor
    records: torch.Tensor
    partial_out: torch.Tensor
    partial_mass: torch.Tensor
    partial_max: torch.Tensor
    arrivals: torch.Tensor
    ring_pages: torch.Tensor

    @property
    def programs(self) -> int:
        """P, the most programs a plan here may have."""
        return self.partial_mass.shape[0] // 2


def make_decode_workspace(
    max_batch: int,
    num_qo_heads: int,
    head_dim: int,
    device: torch.device | str,
    *,
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
    config : default of the shape; the one with the most programs of those to be used.

    Returns
    -------
    DecodeWorkspace : at Hq = 32, H = 8, D = 128, B = 256, L = 32 and 528 programs,
        5 MB.
    """
    rows, group = max_batch * num_kv_heads, num_qo_heads // num_kv_heads
    config = config or default_config(head_dim, group)
    programs = num_programs(config, device)
    ints = {"dtype": torch.int32, "device": device}
    floats = {"dtype": torch.float32, "device": device}
    return DecodeWorkspace(
        cu_tiles=torch.empty(num_layers, rows + 1, **ints),
        shares=torch.empty(num_layers, **ints),
        records=torch.empty(num_layers, programs + rows, RECORD.value, **ints),
        partial_out=torch.empty(2 * programs, group, head_dim, **floats),
        partial_mass=torch.empty(2 * programs, group, **floats),
        partial_max=torch.empty(2 * programs, group, **floats),
        arrivals=torch.zeros(rows, **ints),
        ring_pages=torch.empty(max_batch, **ints),
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
    if workspace.programs < programs:
        raise ValueError(
            f"workspace is for {workspace.programs} programs, not {programs}: make it "
            "with the same config"
        )
