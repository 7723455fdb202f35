"""Branches of SGLang's prefix tree that hold snapshots; see `sessions.snapshot`.

Both generations' trees are made of it. What they say differently is asked of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kvc.scheduling.awaiting import Awaiting
from sglang_kvc.scheduling.expected import Expected
from sglang_kvc.scheduling.lengths import UNLIMITED
from sglang_kvc.sessions.host import Copy
from sglang_kvc.sessions.snapshot import Hit, Snapshot
from sglang_kvc.sessions.store import SessionStore

if TYPE_CHECKING:
    from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache as _Tree
else:
    # SGLang's tree comes behind it.
    _Tree = object


class SessionTree(_Tree):
    """Adds, finds and drops branches.

    Attributes
    ----------
    sessions : the snapshots held; None if the tree is to hold none.
    """

    sessions: SessionStore | None = None

    @cached_property
    def awaiting(self) -> Awaiting:
        """What is kept for requests that wait."""
        return Awaiting(self, self.expected)

    @cached_property
    def expected(self) -> Expected:
        """What is kept for conversations that are expected to go on."""
        return Expected()

    def reset(self) -> None:
        """Forget everything, at the start and when the cache is flushed."""
        if self.sessions is not None:
            self.awaiting.forget()
            self.sessions.clear()
        super().reset()

    def add_branch(self, snapshot: Snapshot, packed_tokens: torch.Tensor) -> None:
        """Take the packed pages of a snapshot, int64 token ids [snapshot.packed]."""
        assert self.sessions is not None
        # A node of their own: it never splits, and tells when they are evicted.
        added = self.insert(InsertParams(key=_key(snapshot), value=packed_tokens))
        snapshot.node = added.last_device_node
        self.sessions.add(snapshot, self._node_id(snapshot.node))

    def extend_branch(
        self, snapshot: Snapshot, req: Any, tail: Sequence[int], row: Any, own_from: int
    ) -> None:
        """Take the pages of a continuation.

        Parameters
        ----------
        snapshot : what it continues; it must not be evicted meanwhile.
        req : the request that ends.
        tail : text behind the fold, whole pages.
        row : their token ids, int64 [len(tail)].
        own_from : how many of them are the tree's already.
        """
        filler = torch.zeros(snapshot.packed, dtype=torch.int64, device=row.device)
        added = InsertParams(key=_key(snapshot, tail), value=torch.cat([filler, row]))
        self.hand_over(req, added, snapshot.packed + own_from)
        snapshot.grow(tail)

    def find_branch(self, snapshot: Snapshot, tail: Sequence[int]) -> Hit | None:
        """Find how far a snapshot continues with a text; this counts as a use of it.

        Returns
        -------
        Hit or None
            None if its packed pages are gone.
        """
        found = self.match_prefix(MatchPrefixParams(key=_key(snapshot, tail)))
        pages = self._matched_pages(found)
        if len(pages) < snapshot.packed:
            return None
        tokens = snapshot.fold + len(pages) - snapshot.packed
        return Hit(snapshot, tokens, found.last_device_node, pages)

    def drop_branch(self, snapshot: Snapshot, *, evicted: bool = False) -> int:
        """Free the pages of a snapshot that has no borrower and one continuation.

        Parameters
        ----------
        snapshot : what is dropped.
        evicted : whether nothing holds more of its text.

        Returns
        -------
        int
            Tokens freed.
        """
        assert self.sessions is not None
        self.sessions.forget(self._node_id(snapshot.node), evicted=evicted)
        return self._drop_leaves(_key(snapshot, snapshot.tail))

    def move_to_host(self, snapshot: Snapshot) -> int:
        """Free the pages of a snapshot that host memory gets, see `sessions.host`.

        Returns
        -------
        int
            Tokens freed; 0 if somebody reads them, or if host memory is too small.
        """
        store = self.sessions
        assert store is not None and store.host is not None
        hit = self.find_branch(snapshot, snapshot.tail)
        if hit is None or not store.host.can_have(hit.held):
            return 0
        before = self.evictable_size()
        lock = self.hold(hit.node)
        unread = before - self.evictable_size() == hit.held
        self.let_go(lock)
        if not unread or not self._is_leaf(hit.node):
            return 0
        key = _key(snapshot, snapshot.tail)
        del snapshot.tail[hit.tokens - hit.snapshot.fold :]
        store.move_to_host(self._node_id(snapshot.node), hit.pages)
        freed = self._drop_leaves(key)
        if freed < hit.held:
            # The tree keeps a part, and could not take it twice.
            store.lose_in_host(snapshot)
        return freed

    def bring_back(self, snapshot: Snapshot) -> bool:
        """Take a snapshot back from host memory, if there is room for it.

        Its pages are read and written in the next step, behind all launched before.
        """
        store, allocator = self.sessions, self.token_to_kv_pool_allocator
        assert store is not None and store.host is not None
        need = store.host.tokens_of(snapshot)
        short = need - allocator.available_size()
        if short > self.evictable_size():
            return False
        if short > 0:
            store.host.wanted = snapshot
            self.evict(EvictParams(num_tokens=short))
            store.host.wanted = None
        tokens = allocator.alloc(need)
        if tokens is None:
            return False
        store.host.take(snapshot, tokens)
        self.add_branch(snapshot, tokens[: snapshot.packed])
        if snapshot.tail:
            key, known = _key(snapshot, snapshot.tail), snapshot.packed
            self.insert(InsertParams(key=key, value=tokens, prev_prefix_len=known))
        return True

    def take_copies(self) -> list[Copy]:
        """What the next step has to copy to host memory and back, first of all."""
        if self.sessions is None or self.sessions.host is None:
            return []
        return self.sessions.host.take_copies()

    def drop_spares(self, tokens: int) -> int:
        """Evict what is held better elsewhere, before anything else goes.

        First whole copies of what is packed, in a snapshot or by a request that will
        leave one; then snapshots that later turns replace; then those that nobody is
        expected to start from. With host memory all go there, first who left first.

        Parameters
        ----------
        tokens : to be freed, if there are so many.

        Returns
        -------
        int
            Tokens freed, in whole leaves.
        """
        freed = 0
        if self.sessions is None:
            return freed
        if tokens > 0:
            for whole in self.sessions.take_whole():
                freed += self._drop_leaves(whole)
                if freed >= tokens:
                    return freed
        for snapshot in self.sessions.superseded():
            if freed >= tokens:
                return freed
            freed += self.drop_branch(snapshot)
        to_host = self.sessions.host is not None
        for snapshot in self.sessions.idle() if to_host else self.sessions.unexpected():
            if freed >= tokens:
                return freed
            if to_host:
                freed += self.move_to_host(snapshot)
            else:
                freed += self.drop_branch(snapshot, evicted=True)
        return freed

    def evict_behind_spares(
        self, params: EvictParams, call: Callable[[EvictParams], EvictResult]
    ) -> EvictResult:
        """Let SGLang evict, by `call`, what spares do not free."""
        wanted = params.num_tokens
        freed = self.drop_spares(wanted)
        if freed < wanted and self.sessions is not None:
            self.awaiting.spare(wanted - freed - self.evictable_size())
            if self.sessions.host is not None:
                # What nobody waits for any more goes there, too.
                freed += self.drop_spares(wanted - freed)
        if freed >= wanted:
            return EvictResult(num_tokens_evicted=freed)
        result = call(replace(params, num_tokens=wanted - freed))
        result.num_tokens_evicted += freed
        return result

    def noticed(self, node: Any) -> None:
        """Look whether a snapshot's packed pages are evicted with a node."""
        if self.sessions is not None:
            self.sessions.forget(self._node_id(node), evicted=True)

    @property
    def reclaimable(self) -> int:
        """Tokens that eviction can free, those kept for waiting requests included."""
        kept = self.awaiting.tokens if self.sessions is not None else 0
        return int(self.evictable_size()) + kept

    @property
    def room_beside_snapshots(self) -> float:
        """Tokens that can be taken without evicting a snapshot."""
        if not self.sessions:
            return UNLIMITED
        free = self.token_to_kv_pool_allocator.available_size()
        return float(free + self.evictable_size() - self.sessions.tokens)

    @abstractmethod
    def hold(self, node: Any) -> Any:
        """Lock a node and all before it; returns what `let_go` takes."""

    @abstractmethod
    def let_go(self, lock: Any) -> None:
        """Undo `hold`."""

    @abstractmethod
    def _drop_leaves(self, key: RadixKey) -> int:
        """Free the end of what the tree has of a text; returns the tokens of it.

        From the last node on up to the first that is locked or shared with others.
        """

    @abstractmethod
    def hand_over(self, req: Any, prompt: InsertParams, own_from: int) -> None:
        """Take pages that a request has computed; see the trees."""

    @abstractmethod
    def _is_leaf(self, node: Any) -> bool:
        """Whether nothing is held behind a node, as far as that is known."""

    @abstractmethod
    def _matched_pages(self, found: Any) -> torch.Tensor:
        """Token ids of a match."""

    @abstractmethod
    def _node_id(self, node: Any) -> Any:
        """What stays the same of a handle."""


def row_of(hit: Hit) -> torch.Tensor:
    """Token ids by position, int64 [hit.tokens]; nobody reads those of the fold."""
    snapshot, pages = hit.snapshot, hit.pages
    return torch.cat([pages.new_zeros(snapshot.fold), pages[snapshot.packed :]])


def _key(snapshot: Snapshot, tail: Sequence[int] = ()) -> RadixKey:
    return RadixKey(snapshot.key(tail), snapshot.branch)
