"""Time decode attention on the rows of `decode_case`, beside FlashAttention-3.

Rows and layers are those of `decode_case`; times are per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.kernels.batches import Shape, fold_by_head
from bench.kernels.decode_case import (
    QUICK_ROWS,
    ROWS,
    Decode,
    Row,
    layouts,
    make_workspace,
    row_batch,
)
from bench.kernels.decode_steps import bench_steps
from bench.kernels.timing import CheckError, Clock, Report
from sglang_kvc.kernels import decode_attention as decode
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena

SECTION = "decode"


def bench_decode(
    arena: Arena,
    shape: Shape,
    clock: Clock,
    report: Report,
    quick: bool,
    fa3: Any,
    *,
    rows: Sequence[Row] | None = None,
    only: str | None = None,
) -> None:
    """Time `rows`, or those of `decode_case`; see the module docstring.

    Parameters
    ----------
    only : the layout to time; both by default.
    """
    device, pages = arena.k.device, arena.k.shape[0]
    for row in rows or (QUICK_ROWS if quick else ROWS):
        for layout in layouts(row, only):
            packed = layout == "packed"
            with report.guard(f"decode {row.name} {layout}"):
                batch = row_batch(row, shape, pages, str(device), packed)
                case = Decode(arena, shape, batch)
                with report.guard(f"decode_attention {row.name} {layout}"):
                    _bench_ours(case, row.name, layout, clock, report)
                # Beside e4m3 FA3 rounds queries to it: another result.
                folds = fa3 is not None and packed and not case.narrow
                if folds:
                    with report.guard(f"fa3_folded {row.name}"):
                        _bench_folded(case, row.name, clock, report, fa3)
                # Last: it changes the newest token of every request.
                with report.guard(f"decode_step {row.name} {layout}"):
                    workspace = make_workspace(shape, case.q.device)
                    folded = _folded(case, fa3) if folds else None
                    about = {"layout": layout, "layers_timed": len(case.layers)}
                    for kernel, timing in bench_steps(case, workspace, folded, clock):
                        report.add(
                            SECTION, kernel, row.name, timing, case.bytes, **about
                        )
                if fa3 is not None and not packed:
                    for size in (1, 64):
                        with report.guard(f"fa3_stock_page{size} {row.name}"):
                            bench_stock(case, row, size, clock, report, fa3)


def _bench_ours(
    case: Decode, name: str, layout: str, clock: Clock, report: Report
) -> None:
    """Time `decode_attention` per layer, and `plan_decode`, which runs once a step."""
    shape, batch = case.shape, case.batch
    workspace = make_workspace(shape, case.q.device)

    def plan() -> None:
        decode.plan_decode(
            batch.tables,
            batch.slots,
            batch.seq_lens,
            workspace,
            num_kv_heads=shape.kv_heads,
        )

    def run(layer: int) -> torch.Tensor:
        return decode.decode_attention(
            **case.arguments(layer), out=case.out, workspace=workspace
        )

    plan()
    error = case.check(run)
    longest = int(batch.resident.max())
    about: dict[str, Any] = {
        "layout": layout,
        "longest": longest,
        "layers_timed": len(case.layers),
    }
    report.add(SECTION, "plan_decode", name, clock.gpu(plan), **about)
    timing = case.time(clock, run)
    report.add(
        SECTION, "decode_attention", name, timing, case.bytes, error=error, **about
    )


def _folded(case: Decode, fa3: Any) -> Callable[[int], torch.Tensor]:
    """Make FA3 attend over the same packed arena, (request, KV head) as its batch."""
    shape, dim = case.shape, case.shape.head_dim
    k, v = (cells.view(-1, PAGE_SIZE, 1, dim) for cells in case.arena[:2])
    query = case.q.view(-1, 1, shape.qo_heads // shape.kv_heads, dim)
    blocks, lens = fold_by_head(case.batch, shape)

    def run(layer: int) -> torch.Tensor:
        out: torch.Tensor = fa3(
            query,
            k,
            v,
            page_table=blocks[layer].flatten(0, 1),
            cache_seqlens=lens[layer].flatten(),
            softmax_scale=case.scale,
            causal=True,
            ver=3,
        )
        return out

    return run


def _bench_folded(
    case: Decode, name: str, clock: Clock, report: Report, fa3: Any
) -> None:
    """Time FA3's attention alone, beside `_bench_ours`."""
    run = _folded(case, fa3)
    error = case.check(run)
    timing = case.time(clock, run)
    about = {"layout": "packed", "layers_timed": len(case.layers)}
    report.add(SECTION, "fa3_folded", name, timing, case.bytes, error=error, **about)


def bench_stock(
    case: Decode, row: Row, size: int, clock: Clock, report: Report, fa3: Any
) -> None:
    """Time FA3 in the layout of stock SGLang: pages of `size` tokens with all heads."""
    shape, device = case.shape, case.q.device
    count = row.requests * -(-row.mean // size)
    cells = (len(case.layers), count, size, shape.kv_heads, shape.head_dim)
    # As SGLang does it, queries are cast to e4m3 beside such a cache.
    kv_dtype = case.arena.k.dtype
    query = case.q[:, None].to(kv_dtype)
    k, v = (
        torch.empty(cells, dtype=case.q.dtype, device=device).normal_().to(kv_dtype)
        for _ in range(2)
    )
    table = torch.randperm(count, device=device).int().view(row.requests, -1)
    lengths = torch.full_like(case.batch.seq_lens, row.mean)
    index = {layer: i for i, layer in enumerate(case.layers)}

    def run(layer: int) -> torch.Tensor:
        return fa3(
            query,
            k[index[layer]],
            v[index[layer]],
            page_table=table,
            cache_seqlens=lengths,
            softmax_scale=case.scale,
            causal=True,
            ver=3,
        )

    if not run(case.layers[0]).isfinite().all():
        raise CheckError("FA3: not finite")
    timing = case.time(clock, run)
    about = {"layout": "stock", "layers_timed": len(case.layers)}
    report.add(SECTION, f"fa3_stock_page{size}", row.name, timing, case.bytes, **about)
