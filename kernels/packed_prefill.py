"""Attention of new tokens over packed blocks and tail, for any NVIDIA GPU.

Heads differ in what they kept, so each (request, KV head) is a sequence with a page
list of its own (`head_tables`): a head's packed blocks, then its blocks of the tail,
which ends with the new tokens. A new token sees all entries but those of tokens behind
it.

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``blocks``, ``lens``    [B, H, width], [B, H]  int32, of one layer, see `head_tables`
``cu_new``              [B + 1]                int32 new tokens before each request
``q``, ``out``          [n, Hq, D]             of the new tokens, contiguous
======================  =====================  =========================================
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.decode_schedule import shared_memory
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.kv_dtype import gather_rows, kernel_arena, kv_scales
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.kernels.packed_prefill_kernels import packed_prefill_kernel
from sglang_kvc.kernels.query_lse import LOG2E


class PrefillConfig(NamedTuple):
    """Tile sizes of `packed_prefill`.

    Attributes
    ----------
    rows : (token, query head) pairs a program, a power of two.
    tile : entries of K and V at a time, a power of two, at least 16.
    num_warps, num_stages : as Triton means them.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def prefill_config(
    head_dim: int, element_size: int, longest_rows: int, *, byte_cells: bool = False
) -> PrefillConfig:
    """Largest tiles whose queries, keys and values fit in the GPU's shared memory.

    Parameters
    ----------
    head_dim : D.
    element_size : bytes of a query's element; K and V are widened to it.
    longest_rows : rows of the request that has most new tokens.
    byte_cells : whether K and V are e4m3, which costs registers to widen.
    """
    lanes = max(16, triton.next_power_of_2(head_dim))
    rows = min(128, max(16, triton.next_power_of_2(longest_rows)))
    # More would not fit in registers beside the sums of wide heads.
    tile, stages = 32 if byte_cells or lanes > 128 else 64, 3
    limit = shared_memory()

    def too_large() -> bool:
        return lanes * element_size * (rows + 2 * tile * stages) > limit

    while stages > 2 and too_large():
        stages -= 1
    while tile > 32 and too_large():
        tile //= 2
    while rows > 16 and too_large():
        rows //= 2
    return PrefillConfig(rows, tile, 8 if rows == 128 else 4, stages)


def packed_prefill_ref(
    arena: Arena,
    q: torch.Tensor,
    blocks: torch.Tensor,
    lens: torch.Tensor,
    cu_new: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    longest_new: int,
) -> torch.Tensor:
    """Plain torch form of `packed_prefill`, in fp32."""
    del longest_new
    heads = arena.num_kv_heads
    scales = kv_scales(arena, layer)
    grouped = q.unflatten(1, (heads, -1))
    out = torch.empty_like(grouped)
    starts = cu_new.tolist()
    for b, (first, end) in enumerate(zip(starts, starts[1:], strict=False)):
        for h, length in enumerate(lens[b].tolist()):
            entry = torch.arange(length, device=q.device)
            block = blocks[b, h].long()[entry // PAGE_SIZE]
            rows = block * PAGE_SIZE + entry % PAGE_SIZE
            k, v = (
                gather_rows(cells, rows, scale)
                for cells, scale in zip(arena[:2], scales, strict=True)
            )
            query = grouped[first:end, h].float()
            last = torch.arange(length - (end - first), length, device=q.device)
            logits = query @ k.T * sm_scale
            hidden = entry > last[:, None, None]
            prob = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
            out[first:end, h] = (prob @ v).to(q.dtype)
    return out.view_as(q)


def packed_prefill_triton(
    arena: Arena,
    q: torch.Tensor,
    blocks: torch.Tensor,
    lens: torch.Tensor,
    cu_new: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    longest_new: int,
    config: PrefillConfig | None = None,
) -> torch.Tensor:
    """Triton form of `packed_prefill`; one launch."""
    arena = kernel_arena(arena)
    heads, dim = arena.num_kv_heads, arena.head_dim
    group = q.shape[1] // heads
    longest_rows = longest_new * group
    config = config or prefill_config(
        dim, q.element_size(), longest_rows, byte_cells=arena.k.dtype == torch.uint8
    )
    out = torch.empty_like(q)
    sequences = lens.numel()
    packed_prefill_kernel[(sequences, -(-longest_rows // config.rows))](
        q,
        arena.k,
        arena.v,
        arena.scales,
        blocks,
        lens,
        cu_new,
        out,
        layer,
        arena.num_layers,
        blocks.shape[-1],
        sm_scale * LOG2E,
        H=heads,
        G=group,
        D=dim,
        DP=max(16, triton.next_power_of_2(dim)),
        S=PAGE_SIZE,
        ROWS=config.rows,
        TILE=config.tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def packed_prefill(
    arena: Arena,
    q: torch.Tensor,
    blocks: torch.Tensor,
    lens: torch.Tensor,
    cu_new: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    longest_new: int,
) -> torch.Tensor:
    """Attend with the new tokens of a batch in one layer.

    Parameters
    ----------
    arena : K and V, those of the new tokens included; only read.
    q, blocks, lens, cu_new : see the module docstring; only read.
    layer : index of the layer in the arena.
    sm_scale : factor on the logits, usually D ** -0.5.
    longest_new : new tokens of the request that has most, known on the host.

    Returns
    -------
    torch.Tensor : [n, Hq, D] of the dtype of `q`, new.
    """
    op = packed_prefill_triton if use_triton(q) else packed_prefill_ref
    return op(
        arena,
        q,
        blocks,
        lens,
        cu_new,
        layer=layer,
        sm_scale=sm_scale,
        longest_new=longest_new,
    )
