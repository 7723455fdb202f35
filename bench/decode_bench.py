"""Decode attention on the rows of the design's table, beside FlashAttention-3.

The arena has all its layers. A graph calls as many of them as read at least 2 GB (four
to all), so no layer finds its KVs in L2; times are per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.batches import Batch, Shape, fold_by_head, head_blocks, make_batch
from bench.decode_steps import TOLERANCE, bench_steps
from bench.timing import CheckError, Clock, Report, Timing, require_close
from sglang_kvc.kernels import decode_attention as decode
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena

SECTION = "decode"
TAIL = 40
MAX_BATCH = 256
GRAPH_BYTES = 2e9


class Row(NamedTuple):
    """`requests` with `mean` KVs a head on average."""

    requests: int
    mean: int
    skew: bool

    @property
    def name(self) -> str:
        """As the results and plots call it."""
        return f"{self.requests}x{self.mean} {'skew' if self.skew else 'equal'}"


ROWS = (
    Row(32, 8192, False),
    Row(32, 8192, True),
    Row(8, 32768, False),
    Row(128, 1024, False),
    Row(128, 1024, True),
    Row(256, 512, True),
    Row(64, 1000, True),
    Row(16, 896, False),
    Row(1, 8192, False),
)
QUICK_ROWS = (ROWS[1], ROWS[5])
ARENA_PAGES = 17_408
"""34 GiB of K and V at Llama-3.1-8B's shape: the largest row and its tails."""


def row_batch(
    row: Row, shape: Shape, pages: int, device: str, packed: bool = True
) -> Batch:
    """Tables of a row: packed blocks and a tail of 40 tokens, or token pages only."""
    heads = shape.heads_per_page
    if not packed:
        blocks = torch.zeros(row.requests, heads, dtype=torch.long)
        folds, lens = [0] * row.requests, [row.mean] * row.requests
    else:
        mean = (row.mean - TAIL) // PAGE_SIZE
        blocks = head_blocks(row.requests, mean, heads, row.skew)
        # No head can keep more KVs than the request has tokens.
        longest = blocks.max(1).values * PAGE_SIZE
        folds = [
            max(n, 4 * row.mean // PAGE_SIZE * PAGE_SIZE) for n in longest.tolist()
        ]
        lens = [fold + TAIL for fold in folds]
    return make_batch(blocks, folds, lens, pages, device, seed=row.requests)


def timed_layers(batch: Batch, shape: Shape) -> list[int]:
    """Layers whose KVs are 2 GB together, four or more, spread over the arena."""
    kvs = int(batch.resident.sum()) / shape.layers
    layer_bytes = kvs * shape.head_dim * 4
    count = min(shape.layers, max(4, math.ceil(GRAPH_BYTES / layer_bytes)))
    return [i * shape.layers // count for i in range(count)]


class Decode:
    """One row, ready to run: query, output, reference outputs of two layers."""

    def __init__(self, arena: Arena, shape: Shape, batch: Batch) -> None:
        self.arena, self.shape, self.batch = arena, shape, batch
        self.scale = shape.head_dim**-0.5
        device = arena.k.device
        size = (len(batch.slots), shape.qo_heads, shape.head_dim)
        self.q = torch.randn(size, device=device).to(arena.k.dtype)
        self.out = torch.empty_like(self.q)
        self.layers = timed_layers(batch, shape)
        # K and V, read once.
        kvs = [batch.layer_kvs(layer, shape.kv_heads) for layer in self.layers]
        self.bytes = sum(kvs) / len(kvs) * shape.head_dim * 2 * arena.k.element_size()
        self.want = {
            layer: decode.decode_attention_ref(
                **self.arguments(layer), out=torch.empty(size, device=device)
            )
            for layer in {self.layers[0], self.layers[-1]}
        }

    def arguments(self, layer: int) -> dict[str, Any]:
        """What `decode_attention` needs, but `out` and `workspace`."""
        return {
            "q": self.q,
            "arena": self.arena,
            "layer": layer,
            "tables": self.batch.tables,
            "slots": self.batch.slots,
            "seq_lens": self.batch.seq_lens,
            "sm_scale": self.scale,
        }

    def check(self, run: Callable[[int], torch.Tensor]) -> float:
        """Largest relative error of `run(layer)`; raises CheckError."""
        return max(
            require_close(f"layer {layer}", run(layer).view_as(want), want, TOLERANCE)
            for layer, want in self.want.items()
        )

    def time(
        self,
        clock: Clock,
        run: Callable[[int], torch.Tensor],
        replays: int | None = None,
    ) -> Timing:
        """Microseconds of one call."""

        def all_layers() -> None:
            for layer in self.layers:
                run(layer)

        us, how = clock.gpu(all_layers, replays=replays)
        return Timing(us / len(self.layers), how)


def make_workspace(shape: Shape, device: torch.device, **config: Any) -> Any:
    """Scratch for the largest batch of a server, as the backend makes it."""
    return decode.make_decode_workspace(
        MAX_BATCH,
        shape.qo_heads,
        shape.head_dim,
        device,
        num_kv_heads=shape.kv_heads,
        num_layers=shape.layers,
        **config,
    )


def bench_decode(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool, fa3: Any
) -> None:
    """All rows; see the module docstring."""
    device, pages = arena.k.device, arena.k.shape[0]
    for row in QUICK_ROWS if quick else ROWS:
        for packed in (True,) if row.skew else (True, False):
            layout = "packed" if packed else "tail"
            with report.guard(f"decode {row.name} {layout}"):
                batch = row_batch(row, shape, pages, str(device), packed)
                case = Decode(arena, shape, batch)
                with report.guard(f"decode_attention {row.name} {layout}"):
                    _bench_ours(case, row.name, layout, clock, report)
                if fa3 is not None and packed:
                    with report.guard(f"fa3_folded {row.name}"):
                        _bench_folded(case, row.name, clock, report, fa3)
                # Last: it changes the newest token of every request.
                with report.guard(f"decode_step {row.name} {layout}"):
                    workspace = make_workspace(shape, case.q.device)
                    folded = _folded(case, fa3) if fa3 is not None and packed else None
                    about = {"layout": layout, "layers_timed": len(case.layers)}
                    for kernel, timing in bench_steps(case, workspace, folded, clock):
                        report.add(
                            SECTION, kernel, row.name, timing, case.bytes, **about
                        )
                if fa3 is not None and not packed:
                    for size in (1, 64):
                        with report.guard(f"fa3_stock_page{size} {row.name}"):
                            _bench_stock(case, row, size, clock, report, fa3)


def _bench_ours(
    case: Decode, name: str, layout: str, clock: Clock, report: Report
) -> None:
    """`decode_attention` per layer, and `plan_decode`, which runs once a step."""
    shape, batch = case.shape, case.batch
    workspace = make_workspace(shape, case.q.device)

    def plan() -> None:
        decode.plan_decode(
            batch.tables,
            batch.slots,
            batch.seq_lens,
            shape.layers,
            shape.kv_heads,
            workspace,
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
    """FA3 on the same packed arena, with (request, KV head) as its batch."""
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
    """Attention alone, beside `_bench_ours`."""
    run = _folded(case, fa3)
    error = case.check(run)
    timing = case.time(clock, run)
    about = {"layout": "packed", "layers_timed": len(case.layers)}
    report.add(SECTION, "fa3_folded", name, timing, case.bytes, error=error, **about)


def _bench_stock(
    case: Decode, row: Row, size: int, clock: Clock, report: Report, fa3: Any
) -> None:
    """FA3 in the layout of stock SGLang: pages of `size` tokens with all heads."""
    shape, device = case.shape, case.q.device
    count = row.requests * -(-row.mean // size)
    cells = (len(case.layers), count, size, shape.kv_heads, shape.head_dim)
    k, v = (
        torch.empty(cells, dtype=case.q.dtype, device=device).normal_()
        for _ in range(2)
    )
    table = torch.randperm(count, device=device).int().view(row.requests, -1)
    lengths = torch.full_like(case.batch.seq_lens, row.mean)
    index = {layer: i for i, layer in enumerate(case.layers)}

    def run(layer: int) -> torch.Tensor:
        return fa3(
            case.q[:, None],
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
