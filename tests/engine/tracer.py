"""Follow which logical positions every head holds through the served passes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from sglang_kvc.eviction import runner as eviction
from sglang_kvc.kernels.layout import PAGE_SIZE


class PassTracer:
    """Wraps `eviction.pack_entries` and keeps the positions of every survivor.

    Attributes
    ----------
    kept : for each slot, a list over passes of [heads] lists of positions.
    lengths : for each slot, the logical length at each of these passes.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.kept: dict[int, list[list[list[int]]]] = {}
        self.lengths: dict[int, list[int]] = {}
        self._pack = eviction.pack_entries
        # Of every row that was read or packed last: a snapshot's come back in any slot.
        self._row_position: dict[int, int] = {}

    def __enter__(self) -> PassTracer:
        eviction.pack_entries = self._record
        return self

    def __exit__(self, *exc: Any) -> None:
        eviction.pack_entries = self._pack

    def _record(self, arena: Any, plan: Any, selected: Any, dest_pages: Any) -> None:
        self._pack(arena, plan, selected, dest_pages)
        heads, tables = arena.heads_per_page, self.runtime.state.tables
        for r, slot in enumerate(plan.slots.tolist()):
            known = self._row_position
            low, high = int(plan.fold_old[r]), int(plan.fold_new[r])
            tokens = tables.req_to_token[slot, low:high].tolist()
            for pos, token in zip(range(low, high), tokens, strict=True):
                page, offset = divmod(token, PAGE_SIZE)
                for lh in range(heads):
                    row = (page * heads + lh) * PAGE_SIZE + offset
                    known[row] = pos
            base = int(plan.keep_base[r])
            offsets = (selected.block_offsets[r].long() * PAGE_SIZE).tolist()
            rows = selected.source_rows[base : base + offsets[-1]].tolist()
            kept = [
                [known[row] for row in rows[offsets[h] : offsets[h + 1]]]
                for h in range(heads)
            ]
            self.kept.setdefault(slot, []).append(kept)
            self.lengths.setdefault(slot, []).append(int(plan.seq_lens[r]))
            entry = torch.arange(base, base + offsets[-1])
            page = dest_pages[entry // (PAGE_SIZE * heads)]
            block = page * heads + entry // PAGE_SIZE % heads
            dest = (block * PAGE_SIZE + entry % PAGE_SIZE).tolist()
            flat = [pos for positions in kept for pos in positions]
            self._row_position |= zip(dest, flat, strict=True)


def shares(kept: list[list[int]], length: int) -> list[float]:
    """Of each token of a prompt, the share of heads that hold it, from `kept`."""
    holders = Counter(position for positions in kept for position in positions)
    fold = max(map(max, kept)) + 1
    # What is behind the fold is held by all; the latest before it always stays.
    heads = len(kept)
    # In thousandths, halves up.
    held = [
        (holders[token] * 1000 + heads // 2) // heads / 1000
        for token in range(min(fold, length))
    ]
    return held + [1.0] * (length - len(held))
