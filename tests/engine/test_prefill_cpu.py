"""The CPU's prefill path against dense attention, and the CPU's page allocator."""

from __future__ import annotations

import torch

from sglang_kvc.attention.prefill import TorchPrefill
from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator
from tests.kernels.test_prefill import dense, make_batch


def test_torch_prefill_equals_dense_attention() -> None:
    """Several requests, with and without a prefix, through the strided view."""
    pool, table, batch, q, layer = make_batch("cpu", torch.float32)
    backend = TorchPrefill(pool, table)
    backend.plan(batch, [])
    out = backend.run(q, layer)
    expected = dense(pool, table, q, layer, torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


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
