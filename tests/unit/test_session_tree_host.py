"""Snapshots that leave the prefix tree for host memory, and come back."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_kvc.scheduling.session_tree import row_of
from sglang_kvc.sessions.host import HostShelf
from sglang_kvc.sessions.store import SessionStore
from tests.unit.test_awaiting import PACKED, POOL, borrowers, loans, queue, server
from tests.unit.test_resumed_admission import KeepingServer
from tests.unit.test_session_tree import TEXT, Held, borrow

__all__ = ["server"]

PAGES = 20
"""Of host memory."""


@pytest.fixture
def held() -> Held:
    held = Held()
    held.store = held.tree.sessions = SessionStore(PAGES)
    return held


def shelf(held: Held) -> HostShelf:
    assert held.store.host is not None
    return held.store.host


def test_all_of_it_goes_and_comes_back(held: Held) -> None:
    """The packed pages, and those behind the fold, in this order."""
    snapshot = held.snapshot()
    held.extend(snapshot, TEXT[64:112])
    before = held.tree.find_branch(snapshot, TEXT[64:300])
    assert before is not None
    assert held.tree.move_to_host(snapshot) == 96
    assert held.sums == (0, 0)
    assert (len(held.store), held.store.tokens, len(shelf(held))) == (0, 0, 1)
    assert held.store.is_in_host(snapshot)
    assert held.tree.bring_back(snapshot)
    assert held.sums == (96, 0)
    assert (list(held.store), held.store.tokens, len(shelf(held))) == (
        [snapshot],
        48,
        0,
    )
    hit = held.tree.find_branch(snapshot, TEXT[64:300])
    assert hit is not None
    assert (hit.tokens, hit.held) == (before.tokens, before.held) == (112, 96)
    there, back = held.tree.take_copies()
    assert (there.to_host, back.to_host) == (True, False)
    assert there.slots == back.slots
    assert torch.equal(there.tokens, before.pages)
    assert torch.equal(back.tokens, hit.pages)
    assert torch.equal(row_of(hit)[64:], back.tokens[48:])
    held.tree.drop_branch(snapshot)
    assert held.sums == (0, 0)
    assert not held.store


def test_its_text_finds_it_there(held: Held) -> None:
    """And again in the pool, once, however often it went."""
    snapshot = held.snapshot()
    for _ in range(3):
        assert [*held.store.along(held_text(), TEXT, 160)] == [snapshot]
        held.tree.move_to_host(snapshot)
        assert [*held.store.along(held_text(), TEXT, 160)] == [snapshot]
        held.tree.bring_back(snapshot)
    assert shelf(held).brought_back == 3


def held_text() -> object:
    from sglang_kvc.sessions.text import TextChain

    return TextChain((None,))


def test_what_somebody_reads_stays(held: Held) -> None:
    snapshot = held.snapshot()
    hit = held.tree.find_branch(snapshot, ())
    assert hit is not None
    give_back = borrow(held, hit.node)
    assert held.tree.move_to_host(snapshot) == 0
    assert list(held.store) == [snapshot]
    give_back()
    assert held.tree.move_to_host(snapshot) == 48


def test_where_two_texts_part_it_stays(held: Held) -> None:
    snapshot = held.snapshot()
    held.extend(snapshot, TEXT[64:96])
    held.extend(snapshot, TEXT[200:232])
    assert snapshot.branches
    assert list(held.store.idle()) == []
    assert held.tree.evict(EvictParams(num_tokens=1)).num_tokens_evicted == 32
    assert list(held.store) == [snapshot]


def test_eviction_moves_who_left_first(held: Held) -> None:
    first, second = held.snapshot(), held.snapshot()
    first.left_at, second.left_at = 2, 1
    assert held.tree.evict(EvictParams(num_tokens=1)).num_tokens_evicted == 48
    assert held.store.is_in_host(second)
    assert list(held.store) == [first]
    assert held.store.evicted == 0


def test_room_for_it_is_made_by_moving_others(held: Held) -> None:
    one = held.snapshot()
    held.tree.move_to_host(one)
    other = held.snapshot()
    taken = held.allocator.alloc(held.allocator.available_size() - 16)
    assert held.tree.bring_back(one)
    assert list(held.store) == [one]
    assert held.store.is_in_host(other)
    give_back = borrow(held, one.node)
    assert not held.tree.bring_back(other)
    assert held.store.is_in_host(other)
    give_back()
    held.allocator.free(taken)


def test_who_is_brought_back_is_not_given_up_for_others(held: Held) -> None:
    """Host memory is full when another one has to go there to make room."""
    one = held.snapshot(packed=16 * PAGES)
    held.tree.move_to_host(one)
    held.snapshot(packed=16 * PAGES)
    held.allocator.alloc(held.allocator.available_size())
    assert held.tree.bring_back(one)
    assert (list(held.store), len(shelf(held)), held.store.evicted) == ([one], 0, 1)


def test_without_room_there_it_stays(held: Held) -> None:
    large = held.snapshot(packed=16 * PAGES + 16)
    assert held.tree.move_to_host(large) == 0
    assert list(held.store) == [large]
    assert held.tree.take_copies() == []


def test_who_loses_a_loan_loses_nothing_else(server: KeepingServer) -> None:
    """Without host memory the tree evicts what was lent."""
    store = server.tree.sessions = SessionStore(POOL // 16)
    reqs = queue(server, 4)
    loans(server).update(reqs, POOL)
    server.tree.evict(EvictParams(num_tokens=PACKED + 16))
    assert borrowers(server) == [1, 1]
    assert store.host is not None
    assert (len(store.host), store.evicted) == (2, 0)
