"""Queries in bytes: kernel against reference, and what the bytes promise."""

import pytest
import torch
import triton
import triton.language as tl

from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.query_ring import (
    LARGEST,
    decode_queries,
    decode_ref,
    encode_queries,
    encode_ref,
    load_queries_ref,
    ring_in,
    ring_pages,
    scales_of,
    store_queries_ref,
)


@triton.jit
def both_ways(q, codes, back, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    row, d = tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
    mask = (row < N) & (d < D)
    found = encode_queries(tl.load(q + row * D + d, mask=mask, other=0.0), DP)
    tl.store(codes + row * D + d, found, mask=mask)
    tl.debug_barrier()
    first = tl.load(codes + row * D + tl.arange(0, 8)[None, :])
    wide = decode_queries(found, scales_of(first), back.dtype.element_ty, DP)
    tl.store(back + row * D + d, wide, mask=mask)


def queries(dim: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Of all sizes; one is nothing, one almost, one has codes between two numbers."""
    q = torch.randn(32, dim) * torch.logspace(-6, 4, 32)[:, None]
    q[3] = 0
    q[4], q[4, 5] = 0, 1e-30
    q[5] = torch.randint(-246, 247, (dim,)) / 2
    q[5, -1] = LARGEST
    return q.to(device, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dim", [8, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_equals_reference(dim: int, dtype: torch.dtype, device: str) -> None:
    q = queries(dim, dtype, device)
    codes = torch.zeros(q.shape, dtype=torch.uint8, device=device)
    back = torch.zeros_like(q)
    both_ways[(1,)](q, codes, back, 32, dim, triton.next_power_of_2(dim))
    assert torch.equal(codes, encode_ref(q))
    assert torch.equal(back, decode_ref(codes, dtype))


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_half_a_step(dim: int, dtype: torch.dtype) -> None:
    q = queries(dim, dtype, "cpu")
    error = (decode_ref(encode_ref(q), torch.float32) - q.float()).abs()
    # A scale is up to twice what it need be.
    largest = q.float().abs().amax(1, keepdim=True)
    step = 2 ** (largest / LARGEST * (1 - 1e-6)).log2().ceil().clamp_min(-126)
    assert (error[:, :8] <= step).all()
    assert (error[:, 8:] <= step / 2).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_no_byte_makes_a_nan_of_what_reads_the_page_next(broken: float) -> None:
    q = torch.randn(2000, 64) * 10
    q[:9, 7] = broken
    codes = encode_ref(q)
    assert (codes & 0x7F).max() == LARGEST
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        assert codes.view(dtype).float().isfinite().all(), dtype


@pytest.mark.parametrize(
    ("group", "itemsize", "pages"),
    [(1, 2, 1), (2, 2, 1), (4, 2, 2), (7, 2, 4), (8, 2, 4), (16, 2, 8)]
    + [(4, 1, 4), (16, 1, 16), (3, 4, 1)],
)
def test_a_ring_lies_in_its_pages(group: int, itemsize: int, pages: int) -> None:
    """32 rows of every layer and head, none over another, whatever the page was."""
    dtype = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}[itemsize]
    assert ring_pages(32, group, itemsize) == pages
    shape = (pages + 2, 3, 2, 16, 64)
    k, v = (torch.zeros(shape).to(dtype) for _ in range(2))
    owned = torch.randperm(pages) + 2
    table = torch.stack([torch.zeros_like(owned), owned]).int()
    ring = ring_in(Arena(k, v, torch.zeros(shape[:-1])), table, 32)
    q = torch.randn(32, 3, 2 * group, 64)
    slots, rows = torch.ones(32, dtype=torch.int64), torch.randperm(32)
    for layer in range(3):
        store_queries_ref(ring, slots, rows, q[:, layer], layer=layer)
        store_queries_ref(ring, slots * 0, rows, q[:, layer], layer=layer)
    how = {"group": group, "head_dim": 64, "dtype": torch.float32}
    found = load_queries_ref(ring, slots, rows, **how)
    assert torch.equal(found, decode_ref(encode_ref(q), torch.float32))
    # The padding page and the page of somebody else.
    assert not ring.k[:2].any() and not ring.v[:2].any()
