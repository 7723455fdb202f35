"""The CPU's prefill path against dense attention, and the CPU's page allocator.

What a GPU's kernels are handed is checked here, too, with torch in their place.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.kernels.ops.attention import flash_attention

from sglang_kvc.attention.prefill import FlashAttention3Prefill, FlashInferPrefill
from sglang_kvc.attention.prefill_packed import FlashAttention3PackedPrefill
from sglang_kvc.attention.prefill_torch import TorchPrefill, WholePrompts
from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator
from tests.kernels.test_prefill import dense, make_batch, make_packed, packed_dense


def test_torch_prefill_equals_dense_attention() -> None:
    """Several requests, with and without a prefix, through the strided view."""
    pool, table, batch, q, layer = make_batch("cpu", torch.float32)
    kernel = TorchPrefill(WholePrompts(pool, table))
    out = kernel.run(kernel.plan(batch, []), q, layer)
    expected = dense(pool, table, q, layer, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def paged_attention(
    q: torch.Tensor,
    pages: list[torch.Tensor],
    lens: list[int],
    starts: list[int],
    cells: tuple[torch.Tensor, torch.Tensor],
    sm_scale: float,
) -> torch.Tensor:
    """Causal attention of sequences over their pages; new tokens are the last ones."""
    out = torch.empty_like(q)
    for own, length, start, end in zip(
        pages, lens, starts[:-1], starts[1:], strict=True
    ):
        k, v = (c[own.long()].flatten(0, 1)[:length].transpose(0, 1) for c in cells)
        query = q[start:end].transpose(0, 1).unflatten(0, (k.shape[0], -1))
        s = query @ k[:, None].transpose(2, 3) * sm_scale
        hidden = torch.ones(end - start, length).triu(length - (end - start) + 1).bool()
        p = s.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:end] = (p @ v[:, None]).flatten(0, 1).transpose(0, 1)
    return out


def torch_fa3(
    *,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    ver: int,
) -> torch.Tensor:
    """In place of FlashAttention-3."""
    assert causal
    assert ver == 3
    integers = (page_table, cache_seqlens, cu_seqlens_q)
    assert {tensor.dtype for tensor in integers} == {torch.int32}
    starts, lens = cu_seqlens_q.tolist(), cache_seqlens.tolist()
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    pages = [
        row[: -(-length // 16)] for row, length in zip(page_table, lens, strict=True)
    ]
    return paged_attention(q, pages, lens, starts, (k_cache, v_cache), softmax_scale)


class TorchFlashInfer:
    """In place of FlashInfer's wrapper; counts its plans."""

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "NHD"
        self.plans = 0

    def plan(self, *args: Any, sm_scale: float, **settings: Any) -> None:
        cu_new, indptr, pages, last_page_len, *shape = args
        assert shape[-1] == 16
        assert settings["causal"]
        self.plans += 1
        self.sm_scale, self.starts = sm_scale, cu_new.tolist()
        self.pages = pages.split(indptr.diff().tolist())
        lens = (indptr.diff() - 1) * 16 + last_page_len
        self.lens = lens.tolist()

    def run(self, q: torch.Tensor, cells: Any) -> torch.Tensor:
        return paged_attention(
            q, list(self.pages), self.lens, self.starts, cells, self.sm_scale
        )


def test_flash_attention_3_is_told_where_requests_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_attention, "flash_attn_with_kvcache", torch_fa3)
    pool, table, batch, q, layer = make_batch("cpu", torch.float32)
    kernel = FlashAttention3Prefill(pool, table)
    out = kernel.run(kernel.plan(batch, []), q, layer)
    torch.testing.assert_close(out, dense(pool, table, q, layer, torch.float32))


def test_flash_attention_3_is_told_where_every_head_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash_attention, "flash_attn_with_kvcache", torch_fa3)
    case, pool, batch, folds, q, layer = make_packed("cpu", torch.float32)
    kernel = FlashAttention3PackedPrefill(pool, case.tables)
    out = kernel.run(kernel.plan(batch, folds), q, layer)
    torch.testing.assert_close(out, packed_dense(case, q, layer, torch.float32))


def test_flashinfer_plans_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer = pytest.importorskip("flashinfer")
    monkeypatch.setattr(
        flashinfer, "BatchPrefillWithPagedKVCacheWrapper", TorchFlashInfer
    )
    pool, table, batch, q, layer = make_batch("cpu", torch.float32)
    kernel = FlashInferPrefill(pool, table)
    expected = dense(pool, table, q, layer, torch.float32)
    for forwards in (1, 2):
        plan = kernel.plan(batch, [])
        for _ in range(2):
            torch.testing.assert_close(kernel.run(plan, q, layer), expected)
        assert kernel._wrapper.plans == forwards


def extend(allocator: TorchPagedAllocator, spans: list[tuple[int, int, int]]):
    """Allocate positions [prefix, seq) of requests (prefix, seq, last_loc)."""
    prefix, seq, last = (torch.tensor(column) for column in zip(*spans, strict=True))
    total = int((seq - prefix).sum())
    return allocator.alloc_extend(prefix, prefix, seq, seq, last, total)


def test_extend_continues_the_last_page_and_takes_whole_pages() -> None:
    """Positions map to (page, position % 16), requests in order, never twice."""
    allocator = TorchPagedAllocator(
        20 * 16, 16, torch.float32, "cpu", None, need_sort=False
    )
    first = extend(allocator, [(0, 20, -1), (0, 16, -1), (0, 5, -1)])
    assert first is not None
    assert first.tolist() == [*range(16, 36), *range(48, 64), *range(64, 69)]
    second = extend(allocator, [(20, 50, 35), (16, 17, 63), (5, 7, 68)])
    assert second is not None
    assert second.tolist() == [
        *range(36, 48), *range(80, 96), 96, 97, 112, 69, 70,
    ]  # fmt: skip
    assert allocator.available_size() == (20 - 7) * 16


def test_decode_takes_a_page_only_at_its_first_token() -> None:
    """One token a request; None when the pages do not suffice."""
    allocator = TorchPagedAllocator(
        3 * 16, 16, torch.float32, "cpu", None, need_sort=False
    )
    lens = torch.tensor([17, 20, 33])
    out = allocator.alloc_decode(lens, lens, torch.tensor([100, 200, 300]))
    assert out is not None
    assert out.tolist() == [16, 201, 32]
    assert allocator.alloc_decode(lens, lens, torch.tensor([1, 2, 3])) is None
    assert extend(allocator, [(0, 17, -1)]) is None
    assert allocator.available_size() == 16
