"""Prefill attention over the arena's page view: stock kernels, no code of our own.

FlashAttention-3 on Hopper, FlashInfer on other NVIDIA GPUs, torch SDPA on the CPU. All
of them read `ArenaKVPool.get_kv_buffer`, a strided [num_pages, 16, H, D] view.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.utils import get_device_capability

from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.memory.kv_pool import ArenaKVPool

FLASHINFER_WORKSPACE_BYTES = 256 << 20
HOPPER = 9

Folds = list[tuple[int, int]]
"""(logical tokens folded, tokens kept per head) of each request of a batch."""


class PrefillAttention(abc.ABC):
    """Causal attention of new tokens over everything their request holds."""

    def __init__(self, pool: ArenaKVPool, req_to_token: torch.Tensor) -> None:
        self.pool = pool
        self.req_to_token = req_to_token

    @abc.abstractmethod
    def plan(self, batch: Any, folds: Folds) -> None:
        """Prepare one forward.

        Parameters
        ----------
        batch : ForwardBatch in extend mode.
        folds : of each request; empty when none of them is compressed yet.
        """

    @abc.abstractmethod
    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attend; `q` is [num_tokens, Hq, D], the result has its shape and dtype."""

    def page_table(self, batch: Any) -> torch.Tensor:
        """Pages of every request, int32 [bs, pages of the longest]."""
        longest = int(batch.seq_lens_cpu.max())
        rows = self.req_to_token[:, :longest:PAGE_SIZE][batch.req_pool_indices]
        return rows // PAGE_SIZE


class TorchPrefill(PrefillAttention):
    """SDPA per request, the CPU path and the reference."""

    def plan(self, batch: Any, folds: Folds) -> None:
        """Keep the batch; SDPA needs no metadata."""
        del folds
        self._slots = batch.req_pool_indices.tolist()
        self._seq_lens = batch.seq_lens_cpu.tolist()
        self._new_lens = list(batch.extend_seq_lens_cpu)

    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attend request by request."""
        k_view, v_view = self.pool.get_kv_buffer(layer.layer_id)
        out = torch.empty_like(q)
        start = 0
        for slot, length, new in zip(
            self._slots, self._seq_lens, self._new_lens, strict=True
        ):
            pages = self.req_to_token[slot, :length:PAGE_SIZE].long() // PAGE_SIZE
            k = k_view[pages].flatten(0, 1)[:length].transpose(0, 1)
            v = v_view[pages].flatten(0, 1)[:length].transpose(0, 1)
            query = q[start : start + new].transpose(0, 1)
            mask = None
            if new != length:
                mask = q.new_full((new, length), float("-inf"))
                mask = mask.triu(length - new + 1)
            result = F.scaled_dot_product_attention(
                query[None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=layer.scaling,
                enable_gqa=query.shape[0] != k.shape[0],
            )
            out[start : start + new] = result[0].transpose(0, 1)
            start += new
        return out


class FlashAttention3Prefill(PrefillAttention):
    """FlashAttention-3, SGLang's default on Hopper."""

    def plan(self, batch: Any, folds: Folds) -> None:
        """Page table and cumulative lengths, on the device."""
        del folds
        self._pages = self.page_table(batch)
        self._seq_lens = batch.seq_lens.to(torch.int32)
        self._cu_new = F.pad(batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
        self._longest_new = max(batch.extend_seq_lens_cpu)

    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One varlen call over the strided page view."""
        from sglang.kernels.ops.attention.flash_attention import (
            flash_attn_with_kvcache,
        )

        k_view, v_view = self.pool.get_kv_buffer(layer.layer_id)
        return flash_attn_with_kvcache(
            q=q,
            k_cache=k_view,
            v_cache=v_view,
            page_table=self._pages,
            cache_seqlens=self._seq_lens,
            cu_seqlens_q=self._cu_new,
            max_seqlen_q=self._longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            ver=3,
        )


class FlashInferPrefill(PrefillAttention):
    """FlashInfer's paged prefill, for NVIDIA GPUs before and after Hopper."""

    def __init__(self, pool: ArenaKVPool, req_to_token: torch.Tensor) -> None:
        super().__init__(pool, req_to_token)
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        workspace = torch.empty(
            FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device
        )
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned_for: tuple[int, float] | None = None

    def plan(self, batch: Any, folds: Folds) -> None:
        """Build FlashInfer's ragged page list; its plan runs at the first layer."""
        del folds
        pages = (batch.seq_lens_cpu + PAGE_SIZE - 1) // PAGE_SIZE
        indptr = F.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
        table = self.page_table(batch)
        column = torch.arange(table.shape[1], device=table.device)
        flat = torch.zeros(int(indptr[-1]), dtype=torch.int32, device=table.device)
        start = indptr[:-1].to(table.device, non_blocking=True)
        count = pages.to(table.device, non_blocking=True)
        # Columns past a request's end are aimed at its last page: no boolean index,
        # whose size the host would have to wait for.
        last = (count - 1)[:, None]
        target = start[:, None] + torch.minimum(column[None], last)
        value = table.gather(1, torch.minimum(column[None], last).long())
        flat.scatter_(0, target.flatten().long(), value.flatten())
        new = torch.tensor(batch.extend_seq_lens_cpu, dtype=torch.int32)
        self._plan_args = (
            F.pad(new.cumsum(0, dtype=torch.int32), (1, 0)),
            indptr,
            flat,
            (batch.seq_lens_cpu.to(torch.int32) - 1) % PAGE_SIZE + 1,
        )
        self._planned_for = None

    def run(self, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One varlen call over the strided page view."""
        k_view, v_view = self.pool.get_kv_buffer(layer.layer_id)
        key = (layer.tp_q_head_num, layer.scaling)
        if self._planned_for != key:
            self._wrapper.plan(
                *self._plan_args,
                layer.tp_q_head_num,
                layer.tp_k_head_num,
                layer.head_dim,
                PAGE_SIZE,
                causal=True,
                sm_scale=layer.scaling,
                q_data_type=q.dtype,
                kv_data_type=k_view.dtype,
            )
            self._planned_for = key
        return self._wrapper.run(q, (k_view, v_view))


def build_prefill(pool: ArenaKVPool, req_to_token: torch.Tensor) -> PrefillAttention:
    """The prefill attention for the pool's device."""
    if torch.device(pool.device).type == "cpu":
        return TorchPrefill(pool, req_to_token)
    if get_device_capability()[0] == HOPPER:
        return FlashAttention3Prefill(pool, req_to_token)
    return FlashInferPrefill(pool, req_to_token)
