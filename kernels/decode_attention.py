"""Decode attention over head blocks: o = softmax(sm_scale q K^T) V, head by head.

One launch serves compressed and uncompressed requests. The KVs of (request, KV head)
are its packed entries, then the tail entries of positions fold_len .. seq_len - 1
(`layout`); attention does not depend on their order, so no position is needed.

The lengths decide how the work is split (``decode_plan``): `plan_decode` runs once
a step for all layers, `decode_attention` once a layer. Shapes, with B requests:

======================  =====================  =========================================
tensor                  shape                  meaning
======================  =====================  =========================================
``q``                   [B, Hq, D]             query of the newest token
``slots``               [B] int32 or int64     row of each request in the tables
``seq_lens``            [B] int32 or int64     logical tokens, the newest one included
======================  =====================  =========================================

Given `NewTokens`, a step needs no `append_kv`: decode attention then writes what that
would, with ring_index = slot * w + (seq_len - 1) % w, and attends to it.
"""

from typing import NamedTuple

import torch
import triton

from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.append import append_kv_ref
from sglang_kvc.kernels.decode_kernels import decode_tiles_kernel
from sglang_kvc.kernels.decode_plan import plan_decode_ref, plan_decode_triton
from sglang_kvc.kernels.decode_schedule import (
    DecodeConfig,
    DecodeWorkspace,
    check_programs,
    check_workspace,
    default_config,
    make_decode_workspace,
    num_programs,
    shared_memory,
)
from sglang_kvc.kernels.dispatch import use_triton
from sglang_kvc.kernels.kv_dtype import gather_rows, kernel_arena, kv_scales
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables
from sglang_kvc.kernels.query_ring import QueryRing

__all__ = [
    "DecodeConfig",
    "DecodeWorkspace",
    "NewTokens",
    "decode_attention",
    "decode_attention_ref",
    "decode_attention_triton",
    "make_decode_workspace",
    "plan_decode",
    "plan_decode_ref",
    "plan_decode_triton",
]

LOG2E = 1.4426950408889634
# Shared memory of a program that tiles of K and V must leave.
_OTHER_SHARED = 16 * 1024


class NewTokens(NamedTuple):
    """K and V of the newest tokens, and where they and their queries are stored.

    Attributes
    ----------
    k, v : [B, H, D], last dimension contiguous.
    out_cache_loc : [B] int64, token ids: those that ``req_to_token`` has at position
        seq_len - 1. Padding rows have token 0.
    query_ring : written in place; slots without a ring record nothing.
    """

    k: torch.Tensor
    v: torch.Tensor
    out_cache_loc: torch.Tensor
    query_ring: QueryRing


class KernelTokens(NamedTuple):
    """`NewTokens` as the kernel takes them."""

    k: torch.Tensor
    v: torch.Tensor
    out_cache_loc: torch.Tensor
    ring_k: torch.Tensor
    ring_v: torch.Tensor


def plan_decode(
    tables: BlockTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    num_kv_heads: int,
    query_ring: QueryRing | None = None,
) -> None:
    """Split the work of this step's `decode_attention` calls, for all layers.

    One launch, from lengths on the device alone: no host synchronisation, and it may
    be captured in a CUDA graph. Does nothing where the reference runs.

    Parameters
    ----------
    tables : only read.
    slots, seq_lens : [B] int32 or int64, the ones `decode_attention` will be given.
    workspace : from `make_decode_workspace`, for at least these B, L and H.
    num_kv_heads : H.
    query_ring : that of the `NewTokens`; without it their queries are not recorded.
    """
    if use_triton(slots):
        plan_decode_triton(
            tables,
            slots,
            seq_lens,
            workspace,
            num_kv_heads=num_kv_heads,
            query_ring=query_ring,
        )


def decode_attention_ref(
    arena: Arena,
    tables: BlockTables,
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    new_tokens: NewTokens | None = None,
    upcast: bool = True,
) -> torch.Tensor:
    """Plain torch form of `decode_attention`; `upcast` = False stays in q's dtype."""
    out = torch.empty_like(q) if out is None else out
    if new_tokens is not None:
        k, v, loc, ring = new_tokens
        rows = (seq_lens.long() - 1) % ring.window
        ring_index = slots.long() * ring.window + rows
        append_kv_ref(arena, k, v, q, loc, ring, ring_index, layer=layer)
    dtype = torch.float32 if upcast else q.dtype
    heads, head_dim = arena.num_kv_heads, arena.head_dim
    k_scale, v_scale = kv_scales(arena, layer)
    folds = tables.fold_lens[slots.long()].tolist()
    requests = zip(slots.tolist(), seq_lens.tolist(), folds, strict=True)
    for b, (slot, seq_len, fold_len) in enumerate(requests):
        rows, valid, _, _ = head_rows_ref(
            tables,
            slot,
            fold_len,
            seq_len,
            first_head=layer * heads,
            num_heads=heads,
        )
        k = gather_rows(arena.k, rows, k_scale, dtype)
        v = gather_rows(arena.v, rows, v_scale, dtype)
        query = q[b].view(heads, -1, head_dim).to(dtype)
        s = (query @ k.transpose(1, 2)) * sm_scale
        if not valid.all():
            # Row 0 may hold anything, also NaN, which 0 * NaN would keep.
            v.masked_fill_(~valid[..., None], 0)
            s.masked_fill_(~valid[:, None], float("-inf"))
        out[b] = (s.softmax(-1) @ v).view(-1, head_dim).to(out.dtype)
    return out


def decode_attention_triton(
    arena: Arena,
    tables: BlockTables,
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    new_tokens: NewTokens | None = None,
    config: DecodeConfig | None = None,
) -> torch.Tensor:
    """Triton form of `decode_attention`; `config` as in `plan_decode_triton`."""
    batch, num_qo_heads, head_dim = q.shape
    out = torch.empty_like(q) if out is None else out
    layers, heads = arena.num_layers, arena.num_kv_heads
    group = num_qo_heads // heads
    if config is None:
        byte_cells = arena.k.element_size() == 1
        config = default_config(head_dim, group, byte_cells=byte_cells)
    programs = num_programs(config, q.device)
    if workspace is None:
        workspace = make_decode_workspace(
            batch,
            num_qo_heads,
            head_dim,
            q.device,
            num_kv_heads=heads,
            num_layers=layers,
            config=config,
        )
        plan_decode_triton(
            tables,
            slots,
            seq_lens,
            workspace,
            num_kv_heads=heads,
            config=config,
            query_ring=None if new_tokens is None else new_tokens.query_ring,
        )
    check_workspace(workspace, batch, layers, heads)
    check_programs(workspace, programs)
    if workspace.partial_out.shape[1:] != (group, head_dim):
        raise ValueError(
            f"workspace is for {tuple(workspace.partial_out.shape[1:])} query heads a "
            f"KV head and head_dim, not {(group, head_dim)}"
        )
    padded_group = triton.next_power_of_2(group)
    padded_dim = triton.next_power_of_2(head_dim)
    tile_bytes = 2 * config.tile * padded_dim * arena.k.element_size()
    tiles = (shared_memory() - _OTHER_SHARED) // tile_bytes
    num_stages = min(config.num_stages, 2 + 2 * tiles)
    strides = [0] * 4
    sizes = {"W": 1, "R": 1, "B": 1}
    new = None
    if new_tokens is not None:
        ring = new_tokens.query_ring
        strides = [x.stride(i) for x in new_tokens[:2] for i in (0, 1)]
        sizes = ring.sizes(group, head_dim)
        # The plan looks up the pages.
        del sizes["N"]
        new = KernelTokens(*new_tokens[:3], *ring[:2])
    decode_tiles_kernel[(programs,)](
        kernel_arena(arena),
        tables.req_to_token,
        tables.packed_pages,
        workspace,
        q,
        new,
        out,
        q.stride(0),
        q.stride(1),
        *strides,
        out.stride(0),
        out.stride(1),
        *tables.row_strides,
        workspace.cu_tiles.stride(0),
        workspace.programs,
        workspace.records.stride(0),
        layer,
        batch * heads,
        sm_scale * LOG2E,
        LH=arena.heads_per_page,
        H=heads,
        G=group,
        D=head_dim,
        S=PAGE_SIZE,
        **sizes,
        GP=max(16, padded_group),
        GR=padded_group,
        DP=padded_dim,
        TILE=config.tile,
        PARTS=max(1, min(16, config.merge_values // (padded_group * padded_dim))),
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        num_stages=num_stages,
    )
    return out


def decode_attention(
    arena: Arena,
    tables: BlockTables,
    q: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    layer: int,
    sm_scale: float,
    out: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    new_tokens: NewTokens | None = None,
) -> torch.Tensor:
    """Attend from one new token of each request over all its resident KVs.

    Parameters
    ----------
    arena, tables : only read, but for the cells of `new_tokens` in the arena.
    q : [B, Hq, D], last dimension contiguous; the arena's dtype, unless that is e4m3.
    slots : [B] int32 or int64. Padding rows have slot 0 and sequence length 1.
    seq_lens : [B] int32 or int64, logical tokens, the current one included.
    layer : which layer of the arena.
    sm_scale : factor on the logits, usually D ** -0.5.
    out : [B, Hq, D], last dimension contiguous; allocated like q by default.
    workspace : from `make_decode_workspace`; `plan_decode` must have filled it for the
        same slots, seq_lens and ring. By default one is allocated and filled here.
    new_tokens : the tokens of `q`, if they are still to be stored in this layer.

    Returns
    -------
    torch.Tensor : `out`, in q's dtype.
    """
    op = decode_attention_triton if use_triton(q) else decode_attention_ref
    return op(
        arena,
        tables,
        q,
        slots,
        seq_lens,
        layer=layer,
        sm_scale=sm_scale,
        out=out,
        workspace=workspace,
        new_tokens=new_tokens,
    )
