"""SGLang's RadixCache for requests whose KVs are partly packed.

The tree itself is stock: it holds token pages of prompts, uncompressed and lossless.
Only the end of a request differs, because a compressed request owns packed pages and
a tail instead of a row of token pages, and holds no lock.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixCache

from sglang_kvc.scheduling.passes import state_of
from sglang_kvc.scheduling.settling import settle_record


def build(context: Any) -> KVCompressRadixCache:
    """Factory for ``--radix-cache-backend kvcompress`` (TreeCacheBuildContext)."""
    return KVCompressRadixCache(context.params)


class KVCompressRadixCache(RadixCache):
    """RadixCache that also releases packed pages; with ``disable`` a chunk cache."""

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """Cache a prompt or a chunk of it.

        A compressed request has handed its prompt to the tree when its first pass was
        settled. Between chunks its pass is settled here, before the next chunk takes
        pages. Without the tree the request's own row is its prefix.
        """
        state = state_of(req)
        if state is not None and chunked:
            for record in list(state.in_flight):
                settle_record(self, record)
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
        for record in state.abandon() if state is not None else ():
            allocator.free_segment(record.target, start_pos=0)
        if state is None or not state.settled_fold:
            super().cache_finished_req(
                req, is_insert=is_insert, kv_len_to_handle=kv_len_to_handle
            )
            return
        allocator.free_segment(state.settled_packed, start_pos=0)
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx]
        tail = row[state.settled_fold : kv_len_to_handle].long()
        allocator.free_segment(tail, start_pos=0)
