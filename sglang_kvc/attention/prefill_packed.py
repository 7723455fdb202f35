"""Prefill attention of a chunk whose request is packed already.

New tokens attend to their request's packed blocks and, causally, to its tail. Heads
differ in what they kept, so each (request, KV head) is a sequence of its own with one
KV head: *per-head sequences*. FlashAttention-3 takes such page lists as they are
(`kernels/head_tables`). FlashInfer wants their lengths on the host, and they are on the
device: a kernel of our own does it there. The CPU has `prefill_torch.PackedPrompts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sglang_kvc.attention.kv_scales import fa3_inputs
from sglang_kvc.attention.prefill import Folds, PlanT, PrefillKernel, new_before
from sglang_kvc.kernels.head_tables import head_tables
from sglang_kvc.kernels.layout import PAGE_SIZE, BlockTables
from sglang_kvc.kernels.packed_prefill import packed_prefill
from sglang_kvc.memory.kv_pool import ArenaKVPool


class OverPageLists(PrefillKernel[PlanT]):
    """Prefill that reads a page list a (request, KV head).

    Parameters
    ----------
    pool : the KV pool.
    tables : request table and block tables.
    """

    def __init__(self, pool: ArenaKVPool, tables: BlockTables) -> None:
        self.pool = pool
        self.tables = tables

    def page_lists(self, batch: Any, folds: Folds) -> tuple[torch.Tensor, torch.Tensor]:
        """Page lists and lengths of a ForwardBatch, see `PerHeadPlan`."""
        arena = self.pool.arena
        lengths = batch.seq_lens_cpu.tolist()
        return head_tables(
            self.tables,
            batch.req_pool_indices,
            batch.seq_lens,
            num_kv_heads=arena.num_kv_heads,
            width=table_width(lengths, folds, arena.heads_per_page),
        )


@dataclass(frozen=True, eq=False)
class PerHeadPlan:
    """Per-head sequences of a batch in all layers; sequence b * H + h is (b, h).

    Attributes
    ----------
    blocks, lens : page lists, int32 [L, bs, H, width], and lengths, int32 [L, bs, H];
        see `kernels/head_tables`.
    source : row (token * H + head) of the queries for each row in sequence order,
        int64 [num_tokens * H].
    cu_new : query rows before each sequence, int32 [bs * H + 1].
    longest_new : new tokens of the request that has most.
    """

    blocks: torch.Tensor
    lens: torch.Tensor
    source: torch.Tensor
    cu_new: torch.Tensor
    longest_new: int


class FlashAttention3PackedPrefill(OverPageLists[PerHeadPlan]):
    """FlashAttention-3 with (request, KV head) as the batch."""

    def plan(self, batch: Any, folds: Folds) -> PerHeadPlan:
        """Page lists of all heads and layers, and the order of the queries."""
        blocks, lens = self.page_lists(batch, folds)
        source, cu_new = per_head_queries(
            batch.extend_seq_lens.long(),
            sum(batch.extend_seq_lens_cpu),
            self.pool.arena.num_kv_heads,
        )
        return PerHeadPlan(
            blocks=blocks,
            lens=lens,
            source=source,
            cu_new=cu_new,
            longest_new=max(batch.extend_seq_lens_cpu),
        )

    def run(self, plan: PerHeadPlan, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One varlen call over the arena as a cache of blocks."""
        from sglang.kernels.ops.attention.flash_attention import (
            flash_attn_with_kvcache,
        )

        arena = self.pool.arena
        heads, dim = arena.num_kv_heads, arena.head_dim
        index = layer.layer_id - self.pool.start_layer
        grouped = q.reshape(q.shape[0] * heads, -1, dim)
        lens = plan.lens[index].flatten()
        query, descales = fa3_inputs(
            self.pool, grouped.index_select(0, plan.source), layer, lens.shape[0], 1
        )
        result = flash_attn_with_kvcache(
            q=query,
            k_cache=arena.k.view(-1, PAGE_SIZE, 1, dim),
            v_cache=arena.v.view(-1, PAGE_SIZE, 1, dim),
            page_table=plan.blocks[index].flatten(0, 1),
            cache_seqlens=lens,
            cu_seqlens_q=plan.cu_new,
            max_seqlen_q=plan.longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            ver=3,
            **descales,
        )
        out = torch.empty_like(grouped)
        out.index_copy_(0, plan.source, result.to(q.dtype))
        return out.view(q.shape)


@dataclass(frozen=True, eq=False)
class PageListPlan:
    """Page lists of a batch in all layers.

    Attributes
    ----------
    blocks, lens : see `PerHeadPlan`.
    cu_new : new tokens before each request, int32 [bs + 1].
    longest_new : new tokens of the request that has most.
    """

    blocks: torch.Tensor
    lens: torch.Tensor
    cu_new: torch.Tensor
    longest_new: int


class TritonPackedPrefill(OverPageLists[PageListPlan]):
    """`kernels/packed_prefill`, for NVIDIA GPUs before and after Hopper."""

    def plan(self, batch: Any, folds: Folds) -> PageListPlan:
        """Page lists of all heads and layers."""
        blocks, lens = self.page_lists(batch, folds)
        return PageListPlan(
            blocks=blocks,
            lens=lens,
            cu_new=new_before(batch),
            longest_new=max(batch.extend_seq_lens_cpu),
        )

    def run(self, plan: PageListPlan, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One launch for the whole batch."""
        index = layer.layer_id - self.pool.start_layer
        return packed_prefill(
            self.pool.arena,
            q.contiguous(),
            plan.blocks[index],
            plan.lens[index],
            plan.cu_new,
            layer=index,
            sm_scale=layer.scaling,
            longest_new=plan.longest_new,
        )


def per_head_queries(
    new: torch.Tensor, total: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring query rows (token, head) into the order of the per-head sequences.

    Parameters
    ----------
    new : new tokens of each request, int64 [bs].
    total : their sum, known on the host so that it need not wait for the device.
    heads : H.

    Returns
    -------
    source, cu_new : see `PerHeadPlan`.
    """
    sequences = new.shape[0] * heads
    repeated = new.repeat_interleave(heads, output_size=sequences)
    ends = repeated.cumsum(0)
    sequence = torch.arange(sequences, device=new.device).repeat_interleave(
        repeated, output_size=total * heads
    )
    # Row x is (request, head, token).
    row = torch.arange(total * heads, device=new.device)
    token = row - (ends - repeated)[sequence]
    token += (new.cumsum(0) - new)[sequence // heads]
    return token * heads + sequence % heads, F.pad(ends.int(), (1, 0))


def table_width(lengths: list[int], folds: Folds, heads_per_page: int) -> int:
    """Blocks that a head of these requests can hold at most.

    One head may win all blocks of its request, but no more than there were tokens.
    """
    width = 1
    for length, fold in zip(lengths, folds, strict=True):
        packed_blocks = min(fold.tokens, fold.packed * heads_per_page) // PAGE_SIZE
        tail_blocks = -((fold.tokens - length) // PAGE_SIZE)  # rounded up
        width = max(width, packed_blocks + tail_blocks)
    return width
