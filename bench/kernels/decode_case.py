"""Rows of requests that decode attention is measured on, ready to run.

The arena has all its layers. A graph calls as many of them as read at least 2 GB (four
to all), so no layer finds its KVs in L2; times are per call.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bench.kernels.batches import Batch, Shape, head_blocks, make_batch
from bench.kernels.timing import Clock, Timing, require_close
from sglang_kvc.kernels import decode_attention as decode
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena

TAIL = 40
MAX_BATCH = 256
GRAPH_BYTES = 2e9
TOLERANCE = 1e-2
"""Relative to the norm of a head's output; one lost block of 8192 KVs is 4e-2."""


class Row(NamedTuple):
    """`requests` with `mean` KVs a head on average."""

    requests: int
    mean: int
    skew: bool

    @property
    def name(self) -> str:
        """Name of the row in results and plots."""
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
LAYOUTS = ("packed", "tail")
"""Packed blocks and a tail, or token pages only."""


def parse_rows(text: str) -> tuple[Row, ...]:
    """``3x6250,256x512s``: requests, KVs a head on average; s: skewed."""
    rows = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)x(\d+)(s?)", part)
        row = Row(int(match[1]), int(match[2]), bool(match[3])) if match else None
        if row is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not like 3x6250 or 3x6250s")
        if not 1 <= row.requests <= MAX_BATCH or row.mean < TAIL + PAGE_SIZE:
            raise argparse.ArgumentTypeError(
                f"{part}: 1 to {MAX_BATCH} requests, {TAIL + PAGE_SIZE} KVs or more"
            )
        rows.append(row)
    return tuple(rows)


def layouts(row: Row, only: str | None = None) -> tuple[str, ...]:
    """Layouts that a row is timed in; skewed heads are packed always."""
    possible = LAYOUTS[:1] if row.skew else LAYOUTS
    return tuple(layout for layout in possible if only in (None, layout))


def row_pages(row: Row) -> int:
    """Pages of an arena that holds a row in every layout, the padding page included."""
    packed = (row.mean - TAIL) // PAGE_SIZE - (-TAIL // PAGE_SIZE)
    return 1 + row.requests * max(packed, -(-row.mean // PAGE_SIZE))


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


def timed_layers(batch: Batch, shape: Shape, itemsize: int) -> list[int]:
    """Layers whose KVs are 2 GB together, four or more, spread over the arena."""
    kvs = int(batch.resident.sum()) / shape.layers
    layer_bytes = kvs * shape.head_dim * 2 * itemsize
    count = min(shape.layers, max(4, math.ceil(GRAPH_BYTES / layer_bytes)))
    return [i * shape.layers // count for i in range(count)]


class Decode:
    """One row, ready to run: query, output, reference outputs of two layers.

    `narrow`: the arena is e4m3, and queries are bf16.
    """

    def __init__(self, arena: Arena, shape: Shape, batch: Batch) -> None:
        self.arena, self.shape, self.batch = arena, shape, batch
        self.scale = shape.head_dim**-0.5
        device = arena.k.device
        size = (len(batch.slots), shape.qo_heads, shape.head_dim)
        self.narrow = arena.k.dtype == E4M3
        dtype = torch.bfloat16 if self.narrow else arena.k.dtype
        self.q = torch.randn(size, device=device).to(dtype)
        self.out = torch.empty_like(self.q)
        self.layers = timed_layers(batch, shape, arena.k.element_size())
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
        """Arguments of `decode_attention`, but `out` and `workspace`."""
        return {
            "q": self.q,
            "arena": self.arena,
            "layer": layer,
            "tables": self.batch.tables,
            "slots": self.batch.slots,
            "seq_lens": self.batch.seq_lens,
            "sm_scale": self.scale,
        }

    def store(self, new: decode.NewTokens) -> None:
        """Store the newest tokens: steps that store them again change no output."""
        for layer, want in self.want.items():
            decode.decode_attention_ref(
                **self.arguments(layer), out=want, new_tokens=new
            )

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
        """Time one call."""

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
