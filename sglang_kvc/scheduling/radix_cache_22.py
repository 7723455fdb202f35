"""The prefix cache on SGLang 0.5.22 and later, see `radix_cache`.

It is SGLang's default tree, whose core is written in Rust. SGLang inserts, frees and
unlocks in calls of their own. The row itself is the prefix of a request between its
chunks, so nothing has to be kept for it here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_kvc.scheduling.attached import hit_of, state_of
from sglang_kvc.scheduling.keeping import keep_snapshot, leaves_nothing
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.session_tree import SessionTree, row_of
from sglang_kvc.scheduling.settling import settle_pass
from sglang_kvc.upstream.types import Req


class RadixCache22(SessionTree, UnifiedRadixCache):
    """Default tree that also frees packed pages; with ``disable`` it keeps nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        # States of requests that own packed pages, by slot: what SGLang frees is named
        # by the record of a request's memory, which has no room for them.
        self._packed: dict[int, RequestState] = {}

    def note_packed(self, state: RequestState) -> None:
        """Note that the row of this state's request now begins with packed pages."""
        self._packed[state.slot] = state

    def hand_over(self, req: Req, prompt: InsertParams, own_from: int) -> None:
        """Take the folded pages of a prompt; the tree frees its second copies itself.

        Parameters
        ----------
        req : the request, whose lock on the first `own_from` tokens still holds.
        prompt : its key and its token pages from the start of its row.
        own_from : tokens that are the tree's already.
        """
        prompt.prev_prefix_len = own_from
        prompt.inserted_len = req.kv.cache_inserted_len
        self.insert(prompt)

    def checkpoint(self, req: Req, *, up_to: int, **settings: Any) -> None:
        """Cache the first `up_to` tokens of a request, at a chunk's end or its own.

        A compressed request has handed its prompt to the tree when its first pass was
        settled. Between chunks its pass is settled here, before the next chunk takes
        pages.
        """
        state = state_of(req)
        goes_on = req.finished_reason is None
        between = goes_on and up_to < len(req.full_untruncated_fill_ids)
        if state is not None and between:
            for launched in list(state.in_flight):
                settle_pass(self, launched)
        if state is not None and state.settled_fold:
            if not goes_on:
                keep_snapshot(self, req, state, up_to)
        elif goes_on or not leaves_nothing(req):
            super().checkpoint(req, up_to=up_to, **settings)

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Free ranges of a row; below the fold it has packed pages instead of them."""
        state = self._packed.get(int(kv.req_pool_idx))
        if state is None or state.kv is not kv:
            super().free_kv_row(kv, ranges)
            return
        if state.settled_packed is not None:
            allocator = self.token_to_kv_pool_allocator
            allocator.free_segment(state.settled_packed, start_pos=0)
            state.settled_packed = None
        first = state.own_from
        tail = [(max(start, first), end) for start, end in ranges if end > first]
        if tail:
            super().free_kv_row(kv, tail)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """End the state of a request whose row is free (finish, abort, retraction).

        Passes in flight die: their fresh pages are freed here and their result is
        skipped. SGLang's record of the memory lives on, so the state ends here.
        """
        state = state_of(req)
        if state is not None:
            allocator = self.token_to_kv_pool_allocator
            state.release_ring(allocator)
            for dead in state.abandon():
                allocator.free_segment(dead.dest_tokens, start_pos=0)
            self._packed.pop(state.slot, None)
            state.give_back()
            state.end()
        super().on_release(req, checkpointed=checkpointed)

    # Snapshots, see `SessionTree` -------------------------------------------------

    def prefix_device_indices(self, req: Req) -> Any:
        """Row of a request that is admitted; of a snapshot it has no page folded."""
        hit = hit_of(req)
        return super().prefix_device_indices(req) if hit is None else row_of(hit)

    def evict(self, params: EvictParams) -> EvictResult:
        """Free tokens for SGLang."""
        return self.evict_behind_spares(params, super().evict)

    def evict_for_alloc(self, params: EvictParams, **how: Any) -> EvictResult:
        """Free tokens for SGLang, which is about to take them."""
        call = partial(super().evict_for_alloc, **how)
        return self.evict_behind_spares(params, call)

    def hold(self, node: Any) -> Any:
        """See `SessionTree`."""
        return self.lock(node)

    def let_go(self, lock: Any) -> None:
        """See `SessionTree`."""
        self.unlock(lock)

    def _drop_leaves(self, key: Any) -> int:
        """See `SessionTree`. The tree must be asked to evict nothing but leaves."""
        last = self.match_prefix(MatchPrefixParams(key=key)).last_device_node
        (path,) = self.tree_core.collect_path_info([last])
        freed, below = dict.fromkeys(self.tree_components, 0), 0
        for node in reversed(path):
            if self._num_children(node) > below or self._is_locked(node.node_id):
                break
            self._evict_device_leaf(node.node_id, freed)
            below = 1
        tokens: int = freed[ComponentType.FULL]
        return tokens

    def _is_leaf(self, node: Any) -> bool:
        """See `SessionTree`."""
        (path,) = self.tree_core.collect_path_info([node])
        return not self._num_children(path[-1])

    def _num_children(self, node: Any) -> float:
        """Nodes behind one of a path, which SGLang 0.5.22 does not say."""
        if hasattr(node, "num_children"):
            return int(node.num_children)
        try:
            return len(self.tree_core.node_by_id(node.node_id).children)
        except NotImplementedError:
            # Its core in Rust. What is not dropped goes in the order of use.
            return math.inf

    def _is_locked(self, node_id: Any) -> bool:
        """Whether anybody has locked a node: then a lock of ours changes no sum."""
        before = self.protected_size()
        lock = self.lock(node_id)
        changed = self.protected_size() != before
        self.unlock(lock)
        return not changed

    def _evict_device_leaf(self, node_id: Any, tracker: Any) -> Any:
        """SGLang evicts a node."""
        self.noticed(node_id)
        return super()._evict_device_leaf(node_id, tracker)

    def _matched_pages(self, found: Any) -> Any:
        """See `SessionTree`."""
        path = self.path_device_indices(found.last_device_node)
        return path[: found.device_prefix_len]

    def _node_id(self, node: Any) -> Any:
        """See `SessionTree`."""
        return node
