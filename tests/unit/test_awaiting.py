"""Loans of snapshots to requests that wait, on SGLang's own tree and allocator."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_kvc.scheduling.awaiting import SHARE, Awaiting
from tests.unit.test_resumed_admission import KeepingCase, KeepingServer

POOL, PROMPT, FOLD, PACKED = 2048, 304, 256, 64


@pytest.fixture
def server() -> KeepingServer:
    """An idle server of a small pool."""
    settings = (POOL, 8192, 512, "never", True, True, 32, 64, 48, 4, PROMPT, 32, 0)
    return KeepingServer(KeepingCase(*settings, kv={"rate": 8}))


def queue(server: KeepingServer, count: int) -> list[Any]:
    """Requests of texts of their own, a snapshot of each."""
    reqs = [server.request(first=1000 * number + 2) for number in range(count)]
    for req in reqs:
        server.hold(req, FOLD, PACKED)
    return reqs


def loans(server: KeepingServer) -> Awaiting:
    """Loans of the server's tree."""
    found: Awaiting = server.tree.awaiting
    return found


def borrowers(server: KeepingServer) -> list[int]:
    """Who uses each snapshot, the oldest first."""
    return [snapshot.borrowers for snapshot in server.tree.sessions]


def test_a_loan_lasts_as_long_as_its_request_waits(server: KeepingServer) -> None:
    """What is lent cannot be evicted."""
    reqs = queue(server, 3)
    for waiting in (reqs, reqs[1:], [reqs[2], reqs[0]], []):
        loans(server).update(waiting, POOL)
        assert borrowers(server) == [int(req in waiting) for req in reqs]
        assert len(loans(server)) == len(waiting)
        assert loans(server).tokens == len(waiting) * PACKED
        assert server.tree.protected_size() == len(waiting) * PACKED
        assert server.tree.reclaimable == 3 * PACKED


def test_a_part_of_the_pool_is_not_lent(server: KeepingServer) -> None:
    """The first in the queue come first; a long prompt that waits gets its room."""
    reqs = queue(server, 28)
    loans(server).update(reqs, POOL)
    lent = borrowers(server)
    assert lent == sorted(lent, reverse=True)
    # The last loan may reach beyond; those without one have prompts, too.
    most = min(SHARE * POOL, POOL - 2 * PROMPT)
    assert most - PACKED < sum(lent) * PACKED <= most + PACKED
    long = server.request(first=50_000)
    long.origin_input_ids = long.origin_input_ids * 3
    loans(server).update([*reqs[:5], long, *reqs[5:]], POOL)
    assert sum(borrowers(server)) * PACKED <= POOL - 2 * 3 * PROMPT + PACKED


def test_memory_that_is_needed_ends_the_last_loan(server: KeepingServer) -> None:
    """And it is not made again in the next round."""
    reqs = queue(server, 4)
    loans(server).update(reqs, POOL)
    server.tree.evict(EvictParams(num_tokens=PACKED))
    assert borrowers(server) == [1, 1, 1]
    assert server.tree.sessions.evicted == 1
    server.tree.evict(EvictParams(num_tokens=PACKED + 16))
    assert borrowers(server) == [1]
    loans(server).update(reqs, POOL)
    assert borrowers(server) == [1]


def test_what_nobody_waits_for_is_evicted_first(server: KeepingServer) -> None:
    """Even if it was used later."""
    reqs = queue(server, 3)
    loans(server).update(reqs[:2], POOL)
    server.tree.evict(EvictParams(num_tokens=PACKED))
    assert borrowers(server) == [1, 1]


@pytest.mark.parametrize("own", [False, True])
def test_who_is_alone_gets_in(server: KeepingServer, own: bool) -> None:
    """Loans to others give way, the last ones, and one's own if it must be."""
    reqs = queue(server, 20)
    loans(server).update(reqs, POOL)
    before = len(loans(server))
    assert before == 20
    # Somebody has ended and has not given back these pages yet.
    server.allocator.alloc(server.allocator.available_size() - 16)
    req = reqs[0] if own else server.request(first=50_000)
    assert server.admit(req) is AddReqResult.CONTINUE
    assert 0 < len(loans(server)) < before
    assert borrowers(server)[: len(loans(server))] == [1] * len(loans(server))


def test_nothing_is_lent_of_an_emptied_tree(server: KeepingServer) -> None:
    """Locks go with the tree."""
    reqs = queue(server, 3)
    loans(server).update(reqs, POOL)
    held = list(server.tree.sessions)
    server.tree.reset()
    assert not loans(server)
    assert loans(server).tokens == 0
    assert not any(snapshot.borrowers for snapshot in held)
    loans(server).update([], POOL)
    assert server.tree.protected_size() == 0
