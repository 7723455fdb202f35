"""The prefix cache on SGLang 0.5.17, see `radix_cache`."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_kvc.scheduling.attached import state_of
from sglang_kvc.scheduling.keeping import keep_snapshot, leaves_nothing
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.session_tree import SessionTree
from sglang_kvc.scheduling.settling import settle_pass


class RadixCache17(SessionTree, RadixCache):
    """RadixCache that also releases packed pages; with ``disable`` a chunk cache."""

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """Cache a prompt or a chunk of it.

        A compressed request has handed its prompt to the tree when its first pass was
        settled. Between chunks its pass is settled here, before the next chunk takes
        pages. Without the tree the request's own row is its prefix.
        """
        state = state_of(req)
        if state is not None and chunked:
            for launched in list(state.in_flight):
                settle_pass(self, launched)
        compressed = state is not None and state.settled_fold
        if compressed and not chunked:
            return
        if compressed or self.disable:
            # Below the fold these are old pages, which nobody reads; the last one
            # tells the allocator where the tail ends.
            row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
            req.prefix_indices = row[: req.extend_range.end].long()
            return
        super().cache_unfinished_req(req, chunked=chunked)

    def note_packed(self, state: RequestState) -> None:
        """Do nothing: a request that ends brings its state itself."""

    def hand_over(self, req: Any, prompt: InsertParams, own_from: int) -> None:
        """Take the folded pages of a prompt, and free those that the tree has already.

        Parameters
        ----------
        req : the request, whose lock on the first `own_from` tokens still holds.
        prompt : its key and its token pages from the start of its row.
        own_from : tokens that are the tree's already.
        """
        del req
        known = self.insert(prompt).prefix_len
        if known > own_from:
            copies = prompt.value[own_from:known]
            self.token_to_kv_pool_allocator.free_segment(copies, start_pos=own_from)

    def cache_finished_req(
        self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int
    ) -> None:
        """Give back everything the request owns (finish, abort, retraction).

        Passes in flight die: their fresh pages are freed here and their result is
        skipped. Until a first pass is settled the request still owns all its token
        pages, so the stock release is right for it.
        """
        state = state_of(req)
        allocator = self.token_to_kv_pool_allocator
        if state is not None:
            state.release_ring(allocator)
        for dead in state.abandon() if state is not None else ():
            allocator.free_segment(dead.dest_tokens, start_pos=0)
        if state is None or not state.settled_fold:
            if state is not None:
                state.end()
            super().cache_finished_req(
                req,
                is_insert=is_insert and not leaves_nothing(req),
                kv_len_to_handle=kv_len_to_handle,
            )
            return
        keep_snapshot(self, req, state, kv_len_to_handle)
        if state.settled_packed is not None:
            allocator.free_segment(state.settled_packed, start_pos=0)
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        own = row[state.own_from : kv_len_to_handle].long()
        if len(own):
            allocator.free_segment(own, start_pos=0)
        if state.borrowed is not None:
            self.dec_lock_ref(req.last_node)
            state.give_back()
        state.end()

    # Snapshots, see `SessionTree` -------------------------------------------------

    def evict(self, params: EvictParams) -> EvictResult:
        """Free tokens for SGLang."""
        return self.evict_behind_spares(params, super().evict)

    def hold(self, node: Any) -> Any:
        """See `SessionTree`."""
        self.inc_lock_ref(node)
        return node

    def let_go(self, lock: Any) -> None:
        """See `SessionTree`."""
        self.dec_lock_ref(lock)

    def _drop_leaves(self, key: Any) -> int:
        """See `SessionTree`."""
        node = self.match_prefix(MatchPrefixParams(key=key)).last_device_node
        freed = 0
        while node is not self.root_node and not node.children and not node.lock_ref:
            self.token_to_kv_pool_allocator.free_segment(node.value, start_pos=0)
            freed += len(node.value)
            self._delete_leaf(node)
            node = node.parent
        return freed

    def _delete_leaf(self, node: Any) -> None:
        """SGLang evicts a node, or drops it."""
        super()._delete_leaf(node)
        self.noticed(node)

    def _is_leaf(self, node: Any) -> bool:
        """See `SessionTree`."""
        return not node.children

    def _matched_pages(self, found: Any) -> Any:
        """See `SessionTree`."""
        return found.device_indices

    def _node_id(self, node: Any) -> Any:
        """See `SessionTree`."""
        return node.id
