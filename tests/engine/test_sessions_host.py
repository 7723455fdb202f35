"""Snapshots in host memory: back in the pool they are what they were."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_kvc.sessions.store import SessionStore
from tests.engine.conversations import keeping_sessions
from tests.engine.inprocess import InProcessScheduler, Output, Request
from tests.engine.texts import prompt

TURNS, CONVERSATIONS = 4, 4
RATE = {"rate": 4}


def first_prompts(model_path: str) -> list[list[int]]:
    return [prompt(model_path, 700 * i, 200 + 61 * i) for i in range(CONVERSATIONS)]


def converse(
    server: InProcessScheduler, model_path: str, between: Any
) -> list[list[Output]]:
    """All answers, turn by turn; `between` runs behind each turn."""
    prompts, answers = first_prompts(model_path), []
    for turn in range(TURNS):
        requests = [
            Request(f"{turn}-{i}", ids, 24, kv=RATE) for i, ids in enumerate(prompts)
        ]
        served = server.serve(requests)
        answers.append([served[request.rid] for request in requests])
        prompts = [
            ids + out.ids + prompt(model_path, 20_000 + 31 * i, 40 + turn)
            for i, (ids, out) in enumerate(zip(prompts, answers[-1], strict=True))
        ]
        between()
    return answers


def drop_whole_copies(server: InProcessScheduler) -> None:
    """So that later turns have nothing else to start from."""
    for key in server.sch.tree_cache.sessions.take_whole():
        server.sch.tree_cache._drop_leaves(key)


def move_all(server: InProcessScheduler, store: SessionStore) -> None:
    """Move every snapshot to host memory, and leave nothing of it in the pool."""
    tree, pool = server.sch.tree_cache, server.allocator.get_kvcache()
    drop_whole_copies(server)
    for snapshot in list(store.superseded()):
        tree.drop_branch(snapshot)
    tokens, size = store.tokens, len(store)
    assert size == CONVERSATIONS
    for snapshot in list(store.idle()):
        tokens += len(snapshot.tail)
        assert tree.move_to_host(snapshot) > 0
    assert (len(store), store.tokens, len(store.host)) == (0, 0, size)
    assert sum(map(store.host.tokens_of, store.host._slots)) == tokens
    assert server.allocator.available_size() == server.allocator.size
    pool.runtime.state.host.copy_all(tree.take_copies())
    for part in pool.arena.cells:
        part.fill_(float("nan"))


@pytest.fixture(params=[True, False], ids=["overlap", "no overlap"])
def server(fresh: InProcessScheduler, request: pytest.FixtureRequest) -> Any:
    fresh.set_overlap(request.param)
    yield fresh
    fresh.set_overlap(True)


def test_a_turn_goes_on_as_from_the_pool(
    server: InProcessScheduler, model_path: str
) -> None:
    """Token by token, from as much text, though the pool was wiped in between."""
    with keeping_sessions(server):
        want = converse(server, model_path, lambda: drop_whole_copies(server))
    with keeping_sessions(server, sessions_host=1.0) as store:
        got = converse(server, model_path, lambda: move_all(server, store))
        assert store.host is not None
        assert store.host.brought_back == CONVERSATIONS * (TURNS - 1)
        assert store.hits == CONVERSATIONS * (TURNS - 1)
        assert store.evicted == 0
    for one, other in zip(want, got, strict=True):
        assert [out.ids for out in one] == [out.ids for out in other]
        resumed = [out.kv[-1]["resumed_tokens"] for out in one]
        assert resumed == [out.kv[-1]["resumed_tokens"] for out in other]
    assert all(resumed)


def test_what_has_no_room_there_is_evicted(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """What later turns have replaced first, then who was put there first."""
    room = 0.05
    with keeping_sessions(fresh, sessions_host=room) as store:
        tree, shelf = fresh.sch.tree_cache, store.host
        converse(fresh, model_path, lambda: drop_whole_copies(fresh))
        snapshots = list(store.idle())
        last = [it for it in snapshots if not it.superseded]
        for snapshot in snapshots:
            tree.move_to_host(snapshot)
        assert shelf is not None
        assert 0 < len(shelf) < len(snapshots)
        kept = [it for it in last if it in shelf]
        assert kept == last[len(last) - len(kept) :]
        assert len(store) + len(shelf) + store.evicted <= store.taken
        assert not list(store)


def test_nothing_is_left_behind_by_a_flush(
    fresh: InProcessScheduler, model_path: str
) -> None:
    with keeping_sessions(fresh, sessions_host=1.0) as store:
        converse(fresh, model_path, lambda: None)
        for snapshot in list(store.idle()):
            fresh.sch.tree_cache.move_to_host(snapshot)
        assert store.host
        fresh.flush()
        assert not store.host
        assert not fresh.sch.tree_cache.take_copies()
        ids = first_prompts(model_path)[0]
        out = fresh.serve([Request("again", ids, 2, kv=RATE)])["again"]
        assert out.cached_tokens == 0
