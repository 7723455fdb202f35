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
    from sglang_kvc.scheduling.request_state import RequestState
    from sglang_kvc.scheduling.step_plan import StepPlan
    from sglang_kvc.upstream.types import ScheduleBatch


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

    def give(
        self, state: RequestState, start: int, batch: ScheduleBatch, plan: StepPlan
    ) -> bool:
        """Give a request its ring, if there are pages to be had.

        Parameters
        ----------
        state : of the request.
        start : first position of its step, hence the oldest query that the ring knows.
        batch, plan : of the step; the plan is written.
        """
        allocator = batch.token_to_kv_pool_allocator
        evict_from_tree_cache(batch.tree_cache, self.tokens)
        if allocator.available_size() < self.tokens:
            return False
        self.held += self.tokens
        state.ring = plan.rings[state.slot] = Ring(allocator.alloc(self.tokens), self)
        state.observed = max(state.observed, start)
        return True


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


def release_ring(state: RequestState, allocator: Any) -> None:
    """Give back the ring of a request, if it has one.

    No step need be waited for: whoever gets the pages writes them in a later step of
    the stream that writes queries.
    """
    ring, state.ring = state.ring, None
    if ring is not None:
        ring.all.held -= len(ring.token_ids)
        allocator.free_segment(ring.token_ids, start_pos=0)
