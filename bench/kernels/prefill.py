"""Time prefill: FA3 on the arena's strided page view and on stock SGLang's layout.

And a chunk behind packed blocks: FA3 with a sequence a head, and `packed_prefill`.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import Clock, Report, require_close
from sglang_kvc.attention.prefill_packed import per_head_queries
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.kernels.packed_prefill import packed_prefill

SECTION = "prefill"
NEW_TOKENS = 8192
PREFIXES = (0, 24_576)
PACKED = ((1, 8192, 2560), (1, 8192, 7680), (1, 2048, 7680), (4, 512, 1024))
"""Requests, new tokens, packed entries of a head on average."""
TOLERANCE = 1e-2


def bench_prefill(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool, fa3: Any
) -> None:
    """Time both layouts, which must agree; there is nothing of ours to check."""
    if fa3 is None:
        print("prefill: skipped, needs FA3", flush=True)
        return
    for prefix in PREFIXES[:1] if quick else PREFIXES:
        with report.guard(f"prefill {NEW_TOKENS} x {prefix}"):
            _bench_prefix(prefix, arena, shape, clock, report, fa3)
    for sizes in PACKED:
        with report.guard(f"prefill behind packed {sizes}"):
            _bench_packed(sizes, arena, shape, clock, report, fa3)


def _bench_prefix(
    prefix: int, arena: Arena, shape: Shape, clock: Clock, report: Report, fa3: Any
) -> None:
    device, length = arena.k.device, NEW_TOKENS + prefix
    views = [cells[:, shape.layers - 1].transpose(1, 2) for cells in arena[:2]]
    # The arena's last pages, which lie furthest from its start.
    page = torch.randperm(length // PAGE_SIZE, device=device)
    table = (arena.k.shape[0] - 1 - page).int()[None]
    stock = [v[table[0].long()].reshape(length, 1, *v.shape[2:]) for v in views]
    tokens = torch.arange(length, dtype=torch.int32, device=device)[None]
    query = torch.randn(NEW_TOKENS, shape.qo_heads, shape.head_dim, device=device)
    query = query.to(arena.k.dtype)
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    starts = torch.tensor([0, NEW_TOKENS], dtype=torch.int32, device=device)

    def run(cache: list[torch.Tensor], pages: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = fa3(
            query,
            *cache,
            page_table=pages,
            cache_seqlens=lengths,
            cu_seqlens_q=starts,
            max_seqlen_q=NEW_TOKENS,
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            ver=3,
        )
        return out

    def run_arena() -> torch.Tensor:
        return run(views, table)

    def run_stock() -> torch.Tensor:
        return run(stock, tokens)

    error = require_close("prefill", run_arena(), run_stock(), TOLERANCE)
    flops = 4 * shape.qo_heads * shape.head_dim * NEW_TOKENS * (prefix + NEW_TOKENS / 2)
    name = f"{NEW_TOKENS} x {prefix}"
    for kernel, work in (("fa3_arena", run_arena), ("fa3_stock_page1", run_stock)):
        timing = clock.gpu(work)
        tflops = round(flops / timing.us / 1e6, 1)
        report.add(SECTION, kernel, name, timing, tflops=tflops, error=error)


def _bench_packed(
    sizes: tuple[int, int, int],
    arena: Arena,
    shape: Shape,
    clock: Clock,
    report: Report,
    fa3: Any,
) -> None:
    """Heads hold from a half to one and a half times the average."""
    requests, new, packed = sizes
    heads, dim, device = shape.kv_heads, shape.head_dim, arena.k.device
    share = torch.linspace(0.5, 1.5, heads)
    lens = (packed * share // PAGE_SIZE * PAGE_SIZE + new).int().expand(requests, -1)
    lens = lens.contiguous().to(device)
    width = int(lens.max()) // PAGE_SIZE + 1
    blocks = torch.randint(
        arena.k.shape[0] * arena.heads_per_page,
        (requests, heads, width),
        dtype=torch.int32,
        device=device,
    )
    query = torch.randn(requests * new, shape.qo_heads, dim, device=device)
    query = query.to(arena.k.dtype)
    each = torch.full((requests,), new, device=device)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device) * new
    source, cu_new = per_head_queries(each, requests * new, heads)

    def run_fa3() -> torch.Tensor:
        grouped = query.reshape(query.shape[0] * heads, -1, dim)
        result = fa3(
            grouped.index_select(0, source),
            arena.k.view(-1, PAGE_SIZE, 1, dim),
            arena.v.view(-1, PAGE_SIZE, 1, dim),
            page_table=blocks.flatten(0, 1),
            cache_seqlens=lens.flatten(),
            cu_seqlens_q=cu_new,
            max_seqlen_q=new,
            softmax_scale=dim**-0.5,
            causal=True,
            ver=3,
        )
        out = torch.empty_like(grouped)
        return out.index_copy_(0, source, result).view(query.shape)

    def run_ours() -> torch.Tensor:
        how = {"layer": 0, "sm_scale": dim**-0.5, "longest_new": new}
        return packed_prefill(arena, query, blocks, lens, starts, **how)

    error = require_close("packed prefill", run_ours(), run_fa3(), TOLERANCE)
    pairs = requests * new * (packed + new / 2) * shape.qo_heads
    name = f"{requests} x {new} behind {packed}"
    for kernel, work in (("fa3_per_head", run_fa3), ("packed_prefill", run_ours)):
        timing = clock.gpu(work)
        tflops = round(4 * dim * pairs / timing.us / 1e6, 1)
        report.add(SECTION, kernel, name, timing, tflops=tflops, error=error)
