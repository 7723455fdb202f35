"""Prefill attention over the arena's page view: stock kernels, no code of our own.

FlashAttention-3 on Hopper, FlashInfer on other NVIDIA GPUs; torch SDPA on the CPU is in
`prefill_torch`. All of them read `ArenaKVPool.get_kv_buffer`, a strided
[num_pages, 16, H, D] view. `prefill_kernels` says which device has which.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

from sglang_kvc.attention.kv_scales import fa3_inputs, flashinfer_scales
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.memory.kv_pool import ArenaKVPool
from sglang_kvc.scheduling.step_plan import Fold

FLASHINFER_WORKSPACE_BYTES = 256 << 20

Folds = Sequence[Fold]
"""Of each request of a batch."""

PlanT = TypeVar("PlanT")


class PrefillKernel(abc.ABC, Generic[PlanT]):
    """Causal attention of new tokens over everything their request holds.

    A kernel keeps nothing of a forward: all of it is in the plan, which is made once a
    forward and read by every layer. Whoever runs a plan keeps it until the last layer.
    """

    @abc.abstractmethod
    def plan(self, batch: Any, folds: Folds) -> PlanT:
        """Prepare one forward.

        Parameters
        ----------
        batch : ForwardBatch in extend mode.
        folds : of each request; empty when none of them is compressed yet.

        Returns
        -------
        What `run` needs of the batch; a frozen record.
        """

    @abc.abstractmethod
    def run(self, plan: PlanT, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """Attend in one layer.

        Parameters
        ----------
        plan : of this forward.
        q : [num_tokens, Hq, D].
        layer : SGLang's RadixAttention.

        Returns
        -------
        Of the shape and dtype of `q`.
        """


def page_table(req_to_token: torch.Tensor, batch: Any) -> torch.Tensor:
    """Pages of every request, int32 [bs, pages of the longest]."""
    longest = int(batch.seq_lens_cpu.max())
    rows = req_to_token[:, :longest:PAGE_SIZE][batch.req_pool_indices]
    return rows // PAGE_SIZE


def new_before(batch: Any) -> torch.Tensor:
    """New tokens before each request, int32 [bs + 1], on the device."""
    return F.pad(batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))


@dataclass(frozen=True, eq=False)
class FlashAttention3Plan:
    """Where the requests of a batch lie, on the device.

    Attributes
    ----------
    pages : int32 [bs, pages of the longest].
    seq_lens : int32 [bs].
    cu_new : new tokens before each request, int32 [bs + 1].
    longest_new : new tokens of the request that has most.
    """

    pages: torch.Tensor
    seq_lens: torch.Tensor
    cu_new: torch.Tensor
    longest_new: int


class FlashAttention3Prefill(PrefillKernel[FlashAttention3Plan]):
    """FlashAttention-3, SGLang's default on Hopper."""

    def __init__(self, pool: ArenaKVPool, req_to_token: torch.Tensor) -> None:
        self.pool = pool
        self.req_to_token = req_to_token

    def plan(self, batch: Any, folds: Folds) -> FlashAttention3Plan:
        """Page table and cumulative lengths, on the device."""
        del folds
        return FlashAttention3Plan(
            pages=page_table(self.req_to_token, batch),
            seq_lens=batch.seq_lens.to(torch.int32),
            cu_new=new_before(batch),
            longest_new=max(batch.extend_seq_lens_cpu),
        )

    def run(
        self, plan: FlashAttention3Plan, q: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        """One varlen call over the strided page view."""
        from sglang.kernels.ops.attention.flash_attention import (
            flash_attn_with_kvcache,
        )

        k_view, v_view = self.pool.get_kv_buffer(layer.layer_id)
        sequences = plan.seq_lens.shape[0]
        query, descales = fa3_inputs(self.pool, q, layer, sequences, k_view.shape[2])
        out: torch.Tensor = flash_attn_with_kvcache(
            q=query,
            k_cache=k_view,
            v_cache=v_view,
            page_table=plan.pages,
            cache_seqlens=plan.seq_lens,
            cu_seqlens_q=plan.cu_new,
            max_seqlen_q=plan.longest_new,
            softmax_scale=layer.scaling,
            causal=True,
            ver=3,
            **descales,
        )
        return out.to(q.dtype)


@dataclass(frozen=True, eq=False)
class FlashInferPlan:
    """What FlashInfer's own `plan` takes first, in its order.

    Attributes
    ----------
    cu_new : new tokens before each request, int32 [bs + 1], on the host.
    indptr : pages before each request, int32 [bs + 1], on the host.
    pages : of all requests, one after the other, int32 [indptr[-1]], on the device.
    last_page_len : tokens on each request's last page, int32 [bs], on the host.
    """

    cu_new: torch.Tensor
    indptr: torch.Tensor
    pages: torch.Tensor
    last_page_len: torch.Tensor


class FlashInferPrefill(PrefillKernel[FlashInferPlan]):
    """FlashInfer's paged prefill, for NVIDIA GPUs before and after Hopper.

    Its wrapper has a plan of its own, made at the first layer, because it needs the
    layer's heads and scale; `_planned_for` says for what.
    """

    def __init__(self, pool: ArenaKVPool, req_to_token: torch.Tensor) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.pool = pool
        self.req_to_token = req_to_token
        workspace = torch.empty(
            FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device
        )
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._planned_for: tuple[FlashInferPlan, int, float] | None = None

    def plan(self, batch: Any, folds: Folds) -> FlashInferPlan:
        """Build FlashInfer's ragged page list."""
        del folds
        pages = (batch.seq_lens_cpu + PAGE_SIZE - 1) // PAGE_SIZE
        indptr = F.pad(pages.cumsum(0, dtype=torch.int32), (1, 0))
        table = page_table(self.req_to_token, batch)
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
        return FlashInferPlan(
            cu_new=F.pad(new.cumsum(0, dtype=torch.int32), (1, 0)),
            indptr=indptr,
            pages=flat,
            last_page_len=(batch.seq_lens_cpu.to(torch.int32) - 1) % PAGE_SIZE + 1,
        )

    def run(self, plan: FlashInferPlan, q: torch.Tensor, layer: Any) -> torch.Tensor:
        """One varlen call over the strided page view."""
        k_view, v_view = self.pool.get_kv_buffer(layer.layer_id)
        # Two plans are never equal: each forward has one of its own.
        key = (plan, layer.tp_q_head_num, layer.scaling)
        if self._planned_for != key:
            self._wrapper.plan(
                plan.cu_new,
                plan.indptr,
                plan.pages,
                plan.last_page_len,
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
        scales = flashinfer_scales(self.pool, layer)
        return self._wrapper.run(q, (k_view, v_view), **scales)
