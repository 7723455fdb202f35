"""Many conversations on one scheduler, with aborts and forced retraction.

``python -m tests.engine.many_sessions OUT.json --sessions 200`` serves so many of four
turns each in a pool that holds some of them. One request in a hundred is aborted, and
SGLang retracts at every seventh decode step. Every page is audited after every poll,
pages of the tree are filled with patterns, strict idle and busy checks are on. Requests
that nobody aborts are answered whole. Then ``--crowd`` sessions are served at once,
see `crowd`: without loans to waiting requests hardly one would find what it has left.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import traceback
from pathlib import Path
from typing import Any

from tests.engine.audited import audited
from tests.engine.crowd import POOL, Crowd
from tests.engine.fuzz import Setting, apply, check_store
from tests.engine.inprocess import (
    InProcessScheduler,
    Output,
    Request,
)
from tests.engine.stress import PageAudit
from tests.engine.tiny_model import VOCAB

TURNS = 4
AT_ONCE = 25
"""Sessions whose turns come together, beside what others have left in the pool."""
ABORTS = 0.01
OPTIONS: tuple[dict[str, Any] | None, ...] = (
    *(None, None, {"rate": 8}, {"rate": 2}),
    *({"budget": 48}, {"keep": "whole"}, {"resume": False}),
)


def first_turn(rng: random.Random, session: int) -> Request:
    """A session's first request."""
    ids = [rng.randrange(2, VOCAB) for _ in range(rng.randint(100, 300))]
    return Request(
        f"{session:04}.0", ids, max_new=rng.choice([2, 17, 40]), kv=rng.choice(OPTIONS)
    )


def next_turn(rng: random.Random, before: Request, out: Output, turn: int) -> Request:
    """What follows an answer; after an abort, what follows what had come."""
    new = [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 16, 33, 60]))]
    return Request(
        f"{before.rid.partition('.')[0]}.{turn}",
        before.ids + out.ids + new,
        max_new=rng.choice([2, 17, 40]),
        kv=before.kv,
    )


def abort_some(rng: random.Random, requests: list[Request]) -> list[Request]:
    """Let them arrive one after another, and abort a share of them."""
    timed = []
    for request in requests:
        arrive = rng.randrange(2 * len(requests))
        abort = arrive + rng.randrange(20) if rng.random() < ABORTS else None
        timed.append(dataclasses.replace(request, arrive=arrive, abort_at=abort))
    return timed


def serve_sessions(
    server: InProcessScheduler, audit: PageAudit, count: int, seed: int = 0
) -> dict[str, int]:
    """Serve `count` sessions; raises if anything is wrong. Returns what happened."""
    apply(server, Setting(sessions=TURNS - 1, retract=True))
    rng, tree = random.Random(f"sessions {seed}"), server.sch.tree_cache
    sessions = [first_turn(rng, number) for number in range(count)]
    names = "requests aborted retractions passes turns_resumed borrowed held"
    total = dict.fromkeys(names.split(), 0)

    def look(now: int) -> None:
        audit.check(now)
        total["borrowed"] += any(it.borrowers for it in tree.sessions)

    server.on_poll = look
    # Turn by turn over all of them, each would be evicted before it is asked again.
    for at in range(0, count, AT_ONCE):
        for turn in range(TURNS):
            requests = abort_some(rng, sessions[at : at + AT_ONCE])
            outputs = server.serve(requests)
            for place, request in enumerate(requests):
                out = outputs[request.rid]
                judge(request, out, total)
                sessions[at + place] = next_turn(rng, request, out, turn + 1)
            held = tree.evictable_size()
            assert tree.protected_size() == 0
            assert server.allocator.available_size() + held == POOL
            check_store(tree.sessions)
            total["held"] = max(total["held"], len(tree.sessions))
    total |= {"hits": tree.sessions.hits, "evicted": tree.sessions.evicted}
    server.flush()
    assert server.allocator.available_size() == POOL
    assert not tree.sessions
    return {**total, "audits": audit.audits, "shared": audit.shared.taken}


def serve_crowd(server: InProcessScheduler, count: int, seed: int) -> dict[str, int]:
    """Serve so many sessions at once in a pool that holds half of them."""
    apply(server, Setting(sessions=TURNS - 1))
    tree = server.sch.tree_cache
    crowd = Crowd(server, count, seed=seed)
    crowd.serve()
    assert not tree.awaiting and not tree.awaiting.tokens
    assert tree.protected_size() == 0
    assert server.allocator.available_size() + tree.evictable_size() == POOL
    assert not any(it.borrowers for it in tree.sessions)
    check_store(tree.sessions)
    counts = {**crowd.counts, "evicted": tree.sessions.evicted}
    server.flush()
    assert server.allocator.available_size() == POOL
    return counts


def judge(request: Request, out: Output, total: dict[str, int]) -> None:
    """Nobody but who was aborted gets less than all tokens."""
    total["requests"] += 1
    total["retractions"] += out.retractions
    if out.kv:
        total["passes"] += out.kv[-1]["passes"]
        total["turns_resumed"] += bool(out.kv[-1].get("resumed_tokens"))
    finish = out.finish or {}
    if request.abort_at is not None and finish.get("type") != "length":
        total["aborted"] += 1
        return
    assert finish.get("type") == "length", (request.rid, finish)
    assert len(out.ids) == request.max_new, (request.rid, len(out.ids))


def main() -> None:
    """Serve; the report holds counts, or the traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.many_sessions")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--crowd", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    options = {"kv_compress_interval": 16, "kv_compress_sessions": True}
    with audited(POOL, **options) as (server, audit):
        try:
            report = dict(serve_sessions(server, audit, args.sessions, args.seed))
            report["crowd"] = serve_crowd(server, args.crowd, args.seed)
        except BaseException:
            report["traceback"] = traceback.format_exc()
    args.out.write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
