"""Time prefill: FA3 on the arena's strided page view and on stock SGLang's layout."""

from __future__ import annotations

from typing import Any

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import Clock, Report, require_close
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena

SECTION = "prefill"
NEW_TOKENS = 8192
PREFIXES = (0, 24_576)
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
