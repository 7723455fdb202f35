"""Conversations of several turns on one scheduler, and what each turn has kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sglang_kvc.memory.host_pages import HostPages
from sglang_kvc.sessions.store import SessionStore
from tests.engine.inprocess import InProcessScheduler, Output, Request
from tests.engine.tracer import PassTracer


@contextmanager
def keeping_sessions(
    server: InProcessScheduler, **options: Any
) -> Iterator[SessionStore]:
    """The scheduler with ``--kv-compress-sessions``; idle before and after."""
    runtime, tree = server.allocator.get_kvcache().runtime, server.sch.tree_cache
    before = runtime.options
    now = dataclasses.replace(before, sessions=True, **options)
    runtime.state.options = runtime.pass_scheduler.options = now
    store = tree.sessions = make_store(server, now.sessions_host)
    try:
        yield store
    finally:
        runtime.state.options = runtime.pass_scheduler.options = before
        server.flush()
        tree.sessions = runtime.state.host = None


def make_store(server: InProcessScheduler, host: float) -> SessionStore:
    """An empty store, with so many times the pool's pages of host memory."""
    state = server.allocator.get_kvcache().runtime.state
    state.host = HostPages(state.arena, host) if host else None
    return SessionStore(state.host.count if state.host is not None else 0)


@dataclass(frozen=True)
class Turn:
    """One turn as it was served.

    Attributes
    ----------
    ids : its prompt, the history included.
    out : what came back.
    lengths, kept : of each pass, as `PassTracer` has them.
    """

    ids: list[int]
    out: Output
    lengths: list[int]
    kept: list[list[list[int]]]


def serve_turn(
    server: InProcessScheduler, tracer: PassTracer, requests: list[Request]
) -> dict[str, Turn]:
    """Serve one turn of several conversations, each in a slot of its own."""
    passes = server.allocator.get_kvcache().runtime.pass_scheduler
    slots: dict[str, int] = {}
    new_state = passes._new_state

    def noting(req: Any) -> Any:
        state = new_state(req)
        slots[req.rid] = state.slot
        return state

    tracer.kept.clear()
    tracer.lengths.clear()
    passes._new_state = noting
    try:
        outputs = server.serve(requests)
    finally:
        del passes._new_state
    assert len(set(slots.values())) == len(requests), "a slot had two owners"
    return {
        request.rid: Turn(
            request.ids,
            outputs[request.rid],
            list(tracer.lengths.get(slots[request.rid], ())),
            list(tracer.kept.get(slots[request.rid], ())),
        )
        for request in requests
    }
