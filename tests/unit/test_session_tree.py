"""Snapshots in the prefix tree: found, locked, counted and evicted by it."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kvc.memory.cpu_allocator import TorchPagedAllocator
from sglang_kvc.scheduling.session_tree import row_of
from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.sessions.text import TextChain
from sglang_kvc.upstream.generation import UPSTREAM
from tests.doubles import tree_of

POOL = 1024
TEXT = array("q", range(2, 402))


class Held:
    """A tree that holds sessions, and a request that ends now and then."""

    def __init__(self) -> None:
        kvcache = SimpleNamespace(store_dtype=torch.float32)
        self.allocator: Any = TorchPagedAllocator(
            POOL, 16, torch.float32, "cpu", kvcache, False
        )
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(4, 512, "cpu", False),
            token_to_kv_pool_allocator=self.allocator,
            page_size=16,
        )
        self.tree = tree_of(params)
        self.store = self.tree.sessions = SessionStore()
        self.req = SimpleNamespace(kv=SimpleNamespace(cache_inserted_len=0))

    def snapshot(self, fold: int = 64, packed: int = 48, **more: Any) -> Snapshot:
        snapshot = self.store.make(
            digest=TextChain((None,)).prefix(TEXT, fold),
            fold=fold,
            packed=packed,
            offsets=None,
            unit=None,
            passes=1,
            **more,
        )
        self.tree.add_branch(snapshot, self.allocator.alloc(packed))
        return snapshot

    def extend(
        self, snapshot: Snapshot, tail: Any, own_from: int = 0, row: Any = None
    ) -> torch.Tensor:
        """Continue with a text, whose pages from `own_from` on are new."""
        new = self.allocator.alloc(len(tail) - own_from)
        row = new if row is None else torch.cat([row[:own_from], new])
        self.tree.extend_branch(snapshot, self.req, tail, row, own_from)
        return row

    def note(self, ids: Any) -> None:
        """Say that a text is held packed, so that its whole copy goes first."""
        digest = TextChain((None,)).prefix(ids, len(ids))
        self.store.note_whole(digest, RadixKey(ids, None))

    def whole(self, ids: Any) -> RadixKey:
        """Leave a whole copy of a text."""
        key = RadixKey(ids, None)
        pages = self.allocator.alloc(len(ids))
        self.tree.insert(InsertParams(key=key, value=pages))
        return key

    def length(self, key: RadixKey) -> int:
        found = self.tree.match_prefix(MatchPrefixParams(key=key))
        return len(self.tree._matched_pages(found))

    @property
    def sums(self) -> tuple[int, int]:
        """Evictable and protected; with what is free it is the pool."""
        tree = self.tree
        evictable, protected = tree.evictable_size(), tree.protected_size()
        assert self.allocator.available_size() + evictable + protected == POOL
        return evictable, protected


@pytest.fixture
def held() -> Held:
    return Held()


def borrow(held: Held, node: Any) -> Any:
    """As SGLang locks the node of a request's prefix; what ends it."""
    if UPSTREAM.frees_rows:
        lock = held.tree.lock(node)
        return lambda: held.tree.unlock(lock)
    held.tree.inc_lock_ref(node)
    return lambda: held.tree.dec_lock_ref(node)


def test_a_snapshot_is_found_as_far_as_its_text_goes(held: Held) -> None:
    snapshot = held.snapshot()
    tail = TEXT[64:112]
    row = held.extend(snapshot, tail)
    hit = held.tree.find_branch(snapshot, TEXT[64:300])
    assert hit is not None
    assert (hit.tokens, hit.held) == (112, 48 + 48)
    assert torch.equal(row_of(hit), torch.cat([row.new_zeros(64), row]))
    other = tail[:20] + array("q", [1] * 40)
    hit = held.tree.find_branch(snapshot, other)
    assert hit is not None
    assert (hit.tokens, hit.held) == (80, 64)
    assert torch.equal(row_of(hit)[64:], row[:16])
    assert held.sums == (96, 0)


def test_prompts_and_snapshots_do_not_meet(held: Held) -> None:
    """Not even a prompt that looks like the key of a snapshot."""
    snapshot = held.snapshot()
    held.extend(snapshot, TEXT[64:112])
    assert held.length(RadixKey(snapshot.key(TEXT[64:112]), None)) == 0
    held.whole(TEXT[:112])
    other = held.snapshot()
    assert held.tree.find_branch(other, TEXT[64:112]).tokens == 64
    assert held.sums == (96 + 112 + 48, 0)


def test_what_is_borrowed_is_protected_and_comes_back(held: Held) -> None:
    snapshot = held.snapshot()
    row = held.extend(snapshot, TEXT[64:128])
    hit = held.tree.find_branch(snapshot, TEXT[64:96])
    assert hit is not None
    ends = borrow(held, hit.node)
    assert held.sums == (32, 80)
    held.tree.evict(EvictParams(num_tokens=POOL))
    assert held.sums == (0, 80)
    assert len(held.store) == 1
    # The borrower ends, with the text that was evicted and more.
    held.extend(snapshot, TEXT[64:160], own_from=32, row=row)
    ends()
    assert held.sums == (48 + 96, 0)
    hit = held.tree.find_branch(snapshot, TEXT[64:])
    assert hit is not None
    assert hit.tokens == 160


def test_second_copies_of_a_continuation_are_freed(held: Held) -> None:
    """Two borrowers have computed the same tokens; the first one's are kept."""
    snapshot = held.snapshot()
    first = held.extend(snapshot, TEXT[64:128])
    held.extend(snapshot, TEXT[64:144])
    assert held.sums == (48 + 80, 0)
    hit = held.tree.find_branch(snapshot, TEXT[64:])
    assert hit is not None
    assert torch.equal(row_of(hit)[64:128], first)
    assert not snapshot.branches


def test_a_dropped_snapshot_gives_back_everything(held: Held) -> None:
    snapshot, other = held.snapshot(), held.snapshot(packed=64)
    held.extend(snapshot, TEXT[64:128])
    held.tree.find_branch(snapshot, TEXT[64:96])
    held.extend(snapshot, TEXT[64:160], own_from=64, row=held.allocator.alloc(64))
    held.tree.drop_branch(snapshot)
    assert list(held.store) == [other]
    assert held.store.evicted == 0
    assert held.tree.find_branch(other, ()) is not None
    assert held.tree.find_branch(snapshot, ()) is None


def test_what_nobody_is_expected_to_use_goes_before_prompts(held: Held) -> None:
    prompt, old, new = held.whole(TEXT[:160]), held.snapshot(), held.snapshot()
    held.extend(new, TEXT[64:128])
    new.overdue = True
    assert held.tree.evict(EvictParams(num_tokens=1)).num_tokens_evicted == 48 + 64
    assert (list(held.store), held.store.evicted) == ([old], 1)
    assert held.length(prompt) == 160


def test_eviction_is_by_one_order_with_prompts(held: Held) -> None:
    old, prompt, new = held.snapshot(), held.whole(TEXT[:160]), held.snapshot()
    held.extend(old, TEXT[64:80])
    # Of the two snapshots the prompt lies between them, until `old` is used again.
    held.tree.find_branch(old, TEXT[64:80])
    held.tree.evict(EvictParams(num_tokens=1))
    assert held.length(prompt) == 0
    assert len(held.store) == 2
    held.tree.evict(EvictParams(num_tokens=1))
    assert list(held.store) == [old]
    assert held.store.evicted == 1
    assert held.tree.find_branch(new, ()) is None
    # The continuation goes before what it continues.
    held.tree.evict(EvictParams(num_tokens=1))
    assert held.tree.find_branch(old, TEXT[64:80]).tokens == 64
    held.tree.evict(EvictParams(num_tokens=1))
    assert held.sums == (0, 0)
    assert (len(held.store), held.store.evicted) == (0, 2)


def test_whole_copies_of_what_is_packed_go_first(held: Held) -> None:
    """Though they were used last; not what others run on, or share."""
    held.snapshot(fold=160, packed=48)
    held.note(TEXT[:160])
    other = held.whole(array("q", [9] * 96))
    copy = held.whole(TEXT[:160])
    shared = held.whole(TEXT[:64] + array("q", [8] * 32))
    assert held.length(copy) == 160
    held.tree.evict(EvictParams(num_tokens=16))
    assert held.length(copy) == 64
    assert held.length(other) == 96
    assert held.length(shared) == 96
    # Once: what is left of it goes in its turn.
    assert list(held.store.take_whole()) == []
    held.tree.evict(EvictParams(num_tokens=16))
    assert len(held.store) == 0
    assert held.length(other) == 96


def test_replaced_snapshots_go_next(held: Held) -> None:
    """Behind whole copies, before what was used longer ago; they are not counted."""
    other = held.whole(array("q", [9] * 96))
    old = held.snapshot()
    held.note(TEXT[:64])
    copy = held.whole(TEXT[:64])
    held.extend(old, TEXT[64:96])
    held.tree.find_branch(old, TEXT[64:80])
    new = held.snapshot(fold=80)
    old.superseded = True
    held.tree.evict(EvictParams(num_tokens=16))
    assert held.length(copy) == 0
    assert list(held.store) == [old, new]
    old.borrowers = 1
    held.tree.evict(EvictParams(num_tokens=16))
    assert held.length(other) == 0
    old.borrowers = 0
    assert held.tree.evict(EvictParams(num_tokens=1)).num_tokens_evicted == 48 + 32
    assert list(held.store) == [new]
    assert held.store.evicted == 0
    assert held.sums == (48, 0)


def test_a_locked_whole_copy_stays(held: Held) -> None:
    held.snapshot(fold=160, packed=48)
    held.note(TEXT[:160])
    copy = held.whole(TEXT[:160])
    found = held.tree.match_prefix(MatchPrefixParams(key=copy))
    ends = borrow(held, found.last_device_node)
    held.tree.evict(EvictParams(num_tokens=POOL))
    assert held.sums == (0, 160)
    ends()
    assert held.length(copy) == 160


def test_what_is_too_small_is_evicted_further(held: Held) -> None:
    """Whole copies free a part of what is asked for, the order of use the rest."""
    held.snapshot(fold=32, packed=16)
    held.note(TEXT[:32])
    held.whole(TEXT[:32])
    other = held.whole(array("q", [9] * 96))
    freed = held.tree.evict(EvictParams(num_tokens=64)).num_tokens_evicted
    assert freed == 32 + 16 + 96
    assert held.length(other) == 0


def test_a_flush_forgets_all(held: Held) -> None:
    held.snapshot()
    held.tree.reset()
    assert not held.store
    assert held.tree.evictable_size() == 0
