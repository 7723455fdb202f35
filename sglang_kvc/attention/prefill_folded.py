"""Prefill attention of a chunk whose request is compressed already.

New tokens attend to their request's packed blocks and, causally, to its tail. Heads
differ in what they kept, so each (request, KV head) is a sequence of its own with one
KV head: *folded*. FlashAttention-3 takes such page lists as they are
(`kernels/head_tables`); the CPU path gathers a head's rows and calls SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.utils import get_device_capability

from sglang_kvc.attention.prefill import HOPPER, Folds, PrefillAttention, TorchPrefill
from sglang_kvc.kernels.addressing import head_rows_ref
from sglang_kvc.kernels.head_tables import head_tables
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables
from sglang_kvc.memory.kv_pool import ArenaKVPool


def can_prefill_folded(pool: ArenaKVPool) -> bool:
    """Whether this device has a kernel for compressed prompts."""
    if torch.device(pool.device).type == "cpu":
        return True
    return bool(get_device_capability()[0] == HOPPER)


class FoldedPrefill(PrefillAttention):
    """Prefill attention that also reads the block tables."""

    def __init__(
        self, pool: ArenaKVPool, req_to_token: torch.Tensor, tables: BlockTables
    ) -> None:
        super().__init__(pool, req_to_token)
        self.tables = tables


class TorchFoldedPrefill(FoldedPrefill, TorchPrefill):
    """SDPA per request over gathered rows; the CPU path and the reference."""

    def plan(self, batch: Any, folds: Folds) -> None:
        """Keep the batch."""
        super().plan(batch, folds)
        self._folds = [fold for fold, _ in folds]

    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attend request by request."""
        arena = self.pool.arena
        heads, dim = arena.num_kv_heads, arena.head_dim
        first = (layer.layer_id - self.pool.start_layer) * heads
        keys, values = arena.k.view(-1, dim), arena.v.view(-1, dim)
        out = torch.empty_like(q)
        start = 0
        for slot, length, new, fold in zip(
            self._slots, self._seq_lens, self._new_lens, self._folds, strict=True
        ):
            rows, valid, positions, _ = head_rows_ref(
                self.tables, slot, fold, length, arena.heads_per_page, first, heads
            )
            query = q[start : start + new].view(new, heads, -1, dim)
            position = torch.arange(length - new, length, device=q.device)
            # [H, 1, new, n]: packed entries have position -1.
            visible = positions[:, None, None, :] <= position[:, None]
            visible &= valid[:, None, None, :]
            k = keys[rows].masked_fill(~valid[..., None], 0)
            v = values[rows].masked_fill(~valid[..., None], 0)
            result = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                k[:, None].expand(-1, query.shape[2], -1, -1),
                v[:, None].expand(-1, query.shape[2], -1, -1),
                attn_mask=visible,
                scale=layer.scaling,
            )
            out[start : start + new] = result.permute(2, 0, 1, 3).flatten(1, 2)
            start += new
        return out


class FlashAttention3FoldedPrefill(FoldedPrefill):
    """FlashAttention-3 with (request, KV head) as the batch."""

    def plan(self, batch: Any, folds: Folds) -> None:
        """Page lists of all heads and layers, and the order of the queries."""
        arena = self.pool.arena
        heads = arena.num_kv_heads
        lengths = batch.seq_lens_cpu.tolist()
        self._blocks, self._lens = head_tables(
            self.tables,
            batch.req_pool_indices,
            batch.seq_lens,
            arena.num_layers,
            heads,
            table_width(lengths, folds, arena.heads_per_page),
        )
        new = batch.extend_seq_lens.long()
        count, total = new.shape[0], sum(batch.extend_seq_lens_cpu)
        self._longest_new = max(batch.extend_seq_lens_cpu)
        # Row x of the folded queries is (request, head, token); find its source.
        repeated = new.repeat_interleave(heads, output_size=count * heads)
        ends = repeated.cumsum(0)
        sequence = torch.arange(count * heads, device=new.device).repeat_interleave(
            repeated, output_size=total * heads
        )
        row = torch.arange(total * heads, device=new.device)
        token = row - (ends - repeated)[sequence]
        token += (new.cumsum(0) - new)[sequence // heads]
        self._source = token * heads + sequence % heads
        self._cu_new = F.pad(ends.int(), (1, 0))

    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One varlen call over the arena as a cache of blocks."""
        from sglang.kernels.ops.attention.flash_attention import (
            flash_attn_with_kvcache,
        )

        arena = self.pool.arena
        heads, dim = arena.num_kv_heads, arena.head_dim
        index = layer.layer_id - self.pool.start_layer
        grouped = q.reshape(q.shape[0] * heads, -1, dim)
        result = flash_attn_with_kvcache(
            q=grouped.index_select(0, self._source),
            k_cache=arena.k.view(-1, PAGE_SIZE, 1, dim),
            v_cache=arena.v.view(-1, PAGE_SIZE, 1, dim),
            page_table=self._blocks[index].flatten(0, 1),
            cache_seqlens=self._lens[index].flatten(),
            cu_seqlens_q=self._cu_new,
            max_seqlen_q=self._longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            ver=3,
        )
        out = torch.empty_like(grouped)
        out.index_copy_(0, self._source, result)
        return out.view(q.shape)


def table_width(lengths: list[int], folds: Folds, heads_per_page: int) -> int:
    """Blocks that a head of these requests can hold at most.

    One head may win all blocks of its request, but no more than there were tokens.
    """
    width = 1
    for length, (fold, budget) in zip(lengths, folds, strict=True):
        packed = min(fold, budget * heads_per_page) // PAGE_SIZE
        width = max(width, packed - (fold - length) // PAGE_SIZE)
    return width


def build_folded_prefill(
    pool: ArenaKVPool, req_to_token: torch.Tensor, tables: BlockTables
) -> FoldedPrefill | None:
    """The attention for compressed prompts, or None if this device has none."""
    if not can_prefill_folded(pool):
        return None
    if torch.device(pool.device).type == "cpu":
        return TorchFoldedPrefill(pool, req_to_token, tables)
    return FlashAttention3FoldedPrefill(pool, req_to_token, tables)
