"""Batches of requests that an eviction pass is timed on."""

from __future__ import annotations

from typing import NamedTuple

from bench.kernels.batches import Batch, Shape, head_blocks, make_batch
from bench.kernels.checks import DEFAULTS, WINDOW
from sglang_kvc.eviction.runner import least_pages
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.pass_plan import PassRequest

RATE = 8


class PassCase(NamedTuple):
    """`requests` with `packed` KVs a head and a tail of `tail` tokens, all of one pass.

    Nothing packed means a first pass, which keeps one KV in `RATE`; a later pass frees
    as many blocks as its tail has.
    """

    requests: int
    packed: int
    tail: int

    @property
    def name(self) -> str:
        """Name of the case in the results."""
        if not self.packed:
            return f"first {self.requests}x{self.tail}"
        return f"later {self.requests}x({self.packed}+{self.tail})"

    @property
    def keep_pages(self) -> int:
        """Pages of a request after the pass."""
        return (self.packed or self.tail // RATE) // PAGE_SIZE

    @property
    def pages(self) -> int:
        """Pages that the requests and the survivors take."""
        held = -(-self.tail // PAGE_SIZE) + self.packed // PAGE_SIZE
        return self.requests * (held + self.keep_pages)


def pass_batch(
    case: PassCase, shape: Shape, pages: int, device: str
) -> tuple[Batch, list[PassRequest]]:
    """Tables of a case, with skewed heads, and the plan's requests."""
    fold = case.packed * RATE
    heads = shape.heads_per_page
    blocks = head_blocks(
        case.requests, case.packed // PAGE_SIZE, heads, skew=case.packed > 0
    )
    seq_len = fold + case.tail
    lens = [seq_len] * case.requests
    batch = make_batch(
        blocks, [fold] * case.requests, lens, pages, device, case.requests
    )
    new = seq_len // PAGE_SIZE * PAGE_SIZE
    folded = (new - fold) // PAGE_SIZE
    protected = max(new - (seq_len - DEFAULTS.protected), 0)
    least = least_pages(DEFAULTS, case.keep_pages, protected)
    requests = [
        PassRequest(
            slot=slot,
            seq_len=seq_len,
            fold_old=fold,
            fold_new=new,
            query_start=max(seq_len - WINDOW, 0),
            packed_pages=packed,
            evict_pages=packed + folded - case.keep_pages,
            evict_most_pages=packed + folded - least,
            protected=protected,
            is_first=not case.packed,
            repeated=False,
            # Decoded tokens are not pooled, prompts are.
            pool_tail=not case.packed,
        )
        for slot, packed in zip(batch.slots.tolist(), batch.packed_pages, strict=True)
    ]
    return batch, requests
