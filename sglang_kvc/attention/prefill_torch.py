"""Prefill attention on the CPU, and the reference: torch SDPA, request by request.

Only what a request holds differs between whole and packed prompts: `WholePrompts` reads
its token pages, `PackedPrompts` the packed blocks and the tail of each head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from sglang_kvc.attention.prefill import Folds, PrefillKernel
from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.kv_dtype import gather_rows, kv_scales, widen_ref
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables
from sglang_kvc.memory.kv_pool import ArenaKVPool


class Chunk(NamedTuple):
    """New tokens of one request.

    Attributes
    ----------
    slot : of the request.
    length : logical tokens of the request, the new ones included.
    new : how many tokens are new; they are the last ones.
    fold : logical tokens held as packed blocks; 0 if nothing is packed.
    """

    slot: int
    length: int
    new: int
    fold: int


class Held(NamedTuple):
    """What a request holds in one layer; n entries a head, room for the longest.

    Attributes
    ----------
    k, v : [H, n, D], in the model's dtype.
    positions : logical positions, [H, n] or the same for all heads [1, n]. -1 for a
        packed entry, which every token sees; past the request's end where a head has
        no entry. None if they are just those of the new tokens.
    """

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor | None


class Prompts(Protocol):
    """Where the KVs of a request are."""

    def held(self, chunk: Chunk, layer_id: int, dtype: torch.dtype) -> Held:
        """Everything up to the chunk's end in a layer, the chunk included."""
        ...


@dataclass(frozen=True)
class WholePrompts:
    """Prompts in token pages.

    Attributes
    ----------
    pool : the KV pool.
    req_to_token : SGLang's request table, [slots, context].
    """

    pool: ArenaKVPool
    req_to_token: torch.Tensor

    def held(self, chunk: Chunk, layer_id: int, dtype: torch.dtype) -> Held:
        """The request's token pages, as one piece."""
        length = chunk.length
        pages = self.req_to_token[chunk.slot, :length:PAGE_SIZE].long() // PAGE_SIZE
        k, v = (
            widen_ref(view[pages], scale, dtype).flatten(0, 1)[:length].transpose(0, 1)
            for view, scale in zip(
                self.pool.get_kv_buffer(layer_id),
                kv_scales(self.pool.arena, layer_id - self.pool.start_layer),
                strict=True,
            )
        )
        if chunk.new == length:
            return Held(k, v, None)
        return Held(k, v, torch.arange(length, device=k.device)[None])


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts of which a part is in packed blocks, another in every head.

    Attributes
    ----------
    pool : the KV pool.
    tables : request table and block tables.
    """

    pool: ArenaKVPool
    tables: BlockTables

    def held(self, chunk: Chunk, layer_id: int, dtype: torch.dtype) -> Held:
        """Packed blocks and tail of every head, gathered row by row."""
        arena = self.pool.arena
        heads, layer = arena.num_kv_heads, layer_id - self.pool.start_layer
        rows, valid, positions, _ = head_rows_ref(
            self.tables,
            chunk.slot,
            chunk.fold,
            chunk.length,
            first_head=layer * heads,
            num_heads=heads,
        )
        k, v = (
            gather_rows(cells, rows, scale, dtype).masked_fill_(~valid[..., None], 0)
            for cells, scale in zip(arena[:2], kv_scales(arena, layer), strict=True)
        )
        return Held(k, v, positions)


class TorchPrefill(PrefillKernel[tuple[Chunk, ...]]):
    """SDPA request by request; the plan is the requests.

    Parameters
    ----------
    prompts : where their KVs are.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def plan(self, batch: Any, folds: Folds) -> tuple[Chunk, ...]:
        """Bring the numbers of each request to the host."""
        slots = batch.req_pool_indices.tolist()
        fold_lens = [fold.tokens for fold in folds] if folds else [0] * len(slots)
        columns = (
            slots,
            batch.seq_lens_cpu.tolist(),
            batch.extend_seq_lens_cpu,
            fold_lens,
        )
        return tuple(map(Chunk._make, zip(*columns, strict=True)))

    def run(self, plan: tuple[Chunk, ...], q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attend request by request."""
        out = torch.empty_like(q)
        start = 0
        for chunk in plan:
            rows = slice(start, start + chunk.new)
            held = self.prompts.held(chunk, layer.layer_id, q.dtype)
            out[rows] = _attend(q[rows], held, chunk, layer.scaling)
            start = rows.stop
        return out


def _attend(q: torch.Tensor, held: Held, chunk: Chunk, sm_scale: float) -> torch.Tensor:
    """SDPA with one KV head a batch entry; `q` and result are [new, Hq, D]."""
    heads, _, dim = held.k.shape
    query = q.view(chunk.new, heads, -1, dim).permute(1, 2, 0, 3)
    visible = None
    if held.positions is not None:
        position = torch.arange(chunk.length - chunk.new, chunk.length, device=q.device)
        # [H or 1, 1, new, n]
        visible = held.positions[:, None, None, :] <= position[:, None]
    result = F.scaled_dot_product_attention(
        query,
        held.k[:, None].expand(-1, query.shape[1], -1, -1),
        held.v[:, None].expand(-1, query.shape[1], -1, -1),
        attn_mask=visible,
        is_causal=visible is None,
        scale=sm_scale,
    )
    return result.permute(2, 0, 1, 3).flatten(1, 2)
