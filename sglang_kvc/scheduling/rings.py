"""Pages of the pool that hold the last queries of a request.

Only a request that can reach a pass takes them, for its whole life: from the step of
its first chunk until it ends, is retracted or aborted. They are ordinary pages of
SGLang's allocator, in no row of its request table. How a page is used:
`kernels/query_ring.py`. What admission asks for them: `Course.ring`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.common import evict_from_tree_cache

if TYPE_CHECKING:
    from sglang_kvc.upstream.types import Allocator, ScheduleBatch


@dataclass(eq=False)
class Rings:
    """What all rings of a server take.

    Attributes
    ----------
    tokens : of one ring; 0 if no pass of this server looks at queries.
    held : of those that requests hold now.
    """

    tokens: int = 0
    held: int = 0

    def take(self, batch: ScheduleBatch) -> Ring | None:
        """Take the pages of one ring; None if there are none to be had."""
        allocator = batch.token_to_kv_pool_allocator
        evict_from_tree_cache(batch.tree_cache, self.tokens)
        if allocator.available_size() < self.tokens:
            return None
        self.held += self.tokens
        return Ring(allocator.alloc(self.tokens), self)


@dataclass(frozen=True, eq=False)
class Ring:
    """The ring of one request.

    Attributes
    ----------
    token_ids : of its pages, int64, on the device.
    all : where it is counted.
    """

    token_ids: Any
    all: Rings

    def give_back(self, allocator: Allocator) -> None:
        """Give its pages back; no step need be waited for.

        Whoever gets them writes them in a later step of the stream that writes queries.
        """
        self.all.held -= len(self.token_ids)
        allocator.free_segment(self.token_ids, start_pos=0)
