"""Random batches in one big arena: tables for the kernel benches.

`kernels.testing.make_case` poisons cells that nobody owns and fits tests. A bench needs
the arena of a real server, tens of GB made once, and many sets of tables over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sglang_kvc.kernels.head_tables import head_tables
from sglang_kvc.kernels.kv_dtype import E4M3
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, BlockTables

SIGMA = 0.8
"""Of the log-normal head lengths."""
LONGEST = 8
"""Most blocks of a head, in means."""


class Shape(NamedTuple):
    """What one GPU holds of a model; Llama-3.1-8B by default."""

    layers: int = 32
    kv_heads: int = 8
    qo_heads: int = 32
    head_dim: int = 128

    @property
    def heads_per_page(self) -> int:
        """Head blocks in a page, L * H."""
        return self.layers * self.kv_heads


class Batch(NamedTuple):
    """R requests. `resident` [R, L*H] counts the KVs of each head, on the CPU."""

    tables: BlockTables
    slots: torch.Tensor
    seq_lens: torch.Tensor
    folds: list[int]
    packed_pages: list[int]
    resident: torch.Tensor
    free_pages: torch.Tensor

    def layer_kvs(self, layer: int, kv_heads: int) -> int:
        """KVs that decode reads in one layer."""
        heads = slice(layer * kv_heads, (layer + 1) * kv_heads)
        return int(self.resident[:, heads].sum())


def make_arena(
    pages: int, shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16
) -> Arena:
    """Random K, V and scores: zeros would be faster than what a server reads.

    In e4m3 every layer has scales of 1.
    """
    cells = (pages, shape.layers, shape.kv_heads, PAGE_SIZE)
    wide = torch.bfloat16 if dtype == E4M3 else dtype
    k, v = (
        torch.empty(*cells, shape.head_dim, dtype=wide, device=device)
        .normal_()
        .to(dtype)
        for _ in range(2)
    )
    scales = torch.ones(2, shape.layers, device=device) if dtype == E4M3 else None
    return Arena(k, v, torch.rand(cells, device=device), scales)


def head_blocks(
    requests: int, mean: int, heads: int, skew: bool, seed: int = 0
) -> torch.Tensor:
    """Packed blocks of every head, [requests, heads] int64; `mean` pages a request.

    A request has the same budget whatever its heads make of it.
    """
    if not skew:
        return torch.full((requests, heads), mean)
    generator = torch.Generator().manual_seed(seed)
    cap = LONGEST * mean
    weights = (torch.randn(requests, heads, generator=generator) * SIGMA).exp()
    weights /= weights.mean(1, keepdim=True)
    blocks = (weights * mean).long().clamp(max=cap)
    for row in blocks:
        while missing := mean * heads - int(row.sum()):
            room = (row < cap).nonzero()[:, 0]
            chosen = torch.randperm(len(room), generator=generator)[:missing]
            row[room[chosen]] += 1
    return blocks


def make_batch(
    blocks: torch.Tensor,
    folds: Sequence[int],
    seq_lens: Sequence[int],
    arena_pages: int,
    device: str,
    seed: int = 0,
) -> Batch:
    """Lay requests out in randomly chosen pages of an arena.

    Parameters
    ----------
    blocks : [R, L*H] packed blocks of each head, a multiple of L*H a request.
    folds : [R] logical tokens that they stand for, multiples of 16.
    seq_lens : [R] logical tokens; those from the fold on lie in token pages.
    arena_pages : pages to choose from; page 0 is the padding page.
    device : where the tables go.

    Raises
    ------
    ValueError : blocks that do not fill pages, or more pages than there are.
    """
    requests, heads = blocks.shape
    if bool((blocks.sum(1) % heads).any()):
        raise ValueError("the packed blocks of a request must fill whole pages")
    packed = (blocks.sum(1) // heads).tolist()
    tails = [-(-(n - f) // PAGE_SIZE) for n, f in zip(seq_lens, folds, strict=True)]
    need = sum(packed) + sum(tails)
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(arena_pages - 1, generator=generator) + 1
    if need > len(pages):
        raise ValueError(f"{need} pages do not fit an arena of {arena_pages}")

    slots = torch.randperm(requests, generator=generator) + 1
    # Triton compiles anew for a row length that is not a multiple of 16.
    shape = (requests + 1, _up(max(seq_lens)))
    # Stale cells hold other people's tokens, as they do in a server.
    high = arena_pages * PAGE_SIZE
    tokens = torch.randint(high, shape, generator=generator, dtype=torch.int32)
    tokens[0] = 0
    fold_lens = torch.zeros(requests + 1, dtype=torch.int32)
    offsets = torch.zeros(requests + 1, heads + 1, dtype=torch.int32)
    # A pass may leave as many packed pages as there are packed and tail pages now.
    width = max(p + t for p, t in zip(packed, tails, strict=True))
    page_table = torch.zeros(requests + 1, _up(width), dtype=torch.int32)
    used = 0
    for r, slot in enumerate(slots.tolist()):
        own = pages[used : used + packed[r] + tails[r]]
        used += len(own)
        fold_lens[slot] = folds[r]
        offsets[slot, 1:] = blocks[r].cumsum(0)
        page_table[slot, : packed[r]] = own[: packed[r]]
        position = torch.arange(seq_lens[r] - folds[r])
        token = own[packed[r] + position // PAGE_SIZE] * PAGE_SIZE
        tokens[slot, folds[r] : seq_lens[r]] = (token + position % PAGE_SIZE).int()
    tail_lens = torch.tensor(seq_lens) - torch.tensor(folds)
    tables = (tokens, fold_lens, offsets, page_table)
    return Batch(
        BlockTables(*(table.to(device) for table in tables)),
        slots.to(device),
        torch.tensor(seq_lens, dtype=torch.int32, device=device),
        list(folds),
        packed,
        blocks * PAGE_SIZE + tail_lens[:, None],
        pages[used:].to(device),
    )


def _up(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // 16) * 16


def fold_by_head(batch: Batch, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """`head_tables` of a batch: R * H requests of one KV head, in every layer."""
    return head_tables(
        batch.tables,
        batch.slots,
        batch.seq_lens,
        num_kv_heads=shape.kv_heads,
        width=-(-int(batch.resident.max()) // PAGE_SIZE),
    )
