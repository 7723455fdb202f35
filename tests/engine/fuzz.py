"""Random loads in many server settings: every request ends, no page is lost.

``python -m tests.engine.fuzz OUT.json --seeds 0 4`` serves 30 requests a seed in each
setting, all in one process: a tiny model, a pool of 1,280 tokens, SGLang's strict idle
and busy checks, an audit of every page after every poll, the liveness watch.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kvc.scheduling.turns import TURN_TOKENS
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.engine.audited import audited
from tests.engine.conversations import make_store
from tests.engine.inprocess import (
    InProcessScheduler,
    Output,
    Request,
)
from tests.engine.stress import POOL, PageAudit
from tests.engine.tiny_model import VOCAB

REQUESTS = 30
LONGEST = 280
"""New tokens: more than the longest interval of `SETTINGS`, so that passes repeat."""
REPORTS = {"report_heads": True, "report_tokens": True}
COUNTED = ("passes", "chunk_passes", "deferred_passes")


@dataclass(frozen=True)
class Setting:
    """One way to run the server."""

    chunk: int = 256
    chunks: str = "auto"
    interval: int = 16
    overlap: bool = True
    radix: bool = True
    priority: bool = False
    retract: bool = False
    pause: bool = False
    turns: int = 2
    turn_tokens: int = 0
    """New tokens of a prefill that answers wait for; 0: as servers have it."""
    sessions: int = 0
    """Turns of a conversation behind its first; 0: no sessions are kept."""
    host: float = 0
    """Host memory for them, as a multiple of the pool."""
    sglang_turns: int = 0
    """SGLang's own, ``--prefill-decode-interval``."""
    delay: int = 0
    """Tokens that first passes wait for; requests draw others."""


SETTINGS = {
    "auto": Setting(),
    "always": Setting(chunks="always"),
    "never": Setting(chunks="never"),
    "unchunked": Setting(chunk=-1),
    "chunk64": Setting(chunk=64),
    "chunk512": Setting(chunk=512),
    "interval256": Setting(interval=256),
    "no radix": Setting(radix=False),
    "no overlap": Setting(overlap=False),
    "priority": Setting(priority=True),
    "retract": Setting(retract=True),
    "pause": Setting(pause=True),
    "no turns": Setting(turns=0),
    "short turns": Setting(turn_tokens=32, chunk=512),
    "turns of chunks": Setting(turns=3, chunk=64, chunks="always"),
    "all at once": Setting(
        chunks="always", radix=False, priority=True, retract=True, pause=True
    ),
    "priority never": Setting(chunks="never", chunk=512, priority=True, overlap=False),
    "delay": Setting(delay=32),
    "delay at once": Setting(
        delay=20, chunks="never", chunk=64, priority=True, retract=True, pause=True
    ),
}
SESSIONS = {
    "sessions": Setting(sessions=3),
    "sessions chunk64": Setting(sessions=2, chunk=64, chunks="always"),
    "sessions no overlap": Setting(sessions=2, overlap=False, interval=256),
    "sessions retract": Setting(sessions=2, retract=True),
    "sessions delay": Setting(sessions=3, delay=16, retract=True),
    "sessions at once": Setting(
        sessions=2, chunks="always", priority=True, retract=True, pause=True
    ),
    "host memory": Setting(sessions=3, host=2),
    "little host memory": Setting(sessions=3, host=0.3, overlap=False),
    "host memory at once": Setting(
        sessions=2, host=1, chunk=64, chunks="always", retract=True, pause=True
    ),
}
SETTINGS |= SESSIONS
if isinstance(UPSTREAM, Generation22):
    SETTINGS["turns of SGLang"] = Setting(turns=0, sglang_turns=3, chunk=64)


def draw(rng: random.Random, name: str, setting: Setting, count: int) -> list[Request]:
    """Prompts of every length, some beyond the pool; options good and bad; aborts."""
    shared = [rng.randrange(2, VOCAB) for _ in range(1400)]
    options: list[dict[str, Any] | None] = [
        *(None, {"rate": 1.01}, {"rate": 1.1}, {"rate": 1.5}, {"rate": 2}, {"rate": 8}),
        *({"budget": 48}, {"budget": 96}, {"budget": 608}, {"budget": 1 << 30}),
        *({"enabled": False}, {"rate": 1}, {"rate": 4, **REPORTS}),
        *({"rate": 0.5}, {"budget": 1 << 63}, {"bud": 1}),
    ]
    requests = []
    for i in range(count):
        low, high = rng.choice([(1, 70), (1, 500), (400, 1290), (1200, 2600)])
        length = rng.choice([rng.randint(low, high), rng.randint(low, high) // 16 * 16])
        ids = [rng.randrange(2, VOCAB) for _ in range(max(length, 1))]
        if rng.random() < 0.5:
            keep = rng.randint(0, min(len(ids), len(shared)))
            ids[:keep] = shared[:keep]
        arrive = rng.randrange(0, 80)
        aborted = rng.random() < 0.15
        requests.append(
            Request(
                f"{name}-{i:03}",
                ids,
                max_new=rng.choice([0, 1, 2, 17, 40, 90, LONGEST]),
                kv=with_delay(
                    with_answer(rng.choice(options), f"{name}-{i:03}"),
                    f"{name}-{i:03}",
                    setting,
                ),
                arrive=arrive,
                abort_at=arrive + rng.randrange(0, 60) if aborted else None,
                ignore_eos=rng.random() < 0.7,
                priority=rng.randrange(3) if setting.priority else None,
                logprob_start=rng.randrange(len(ids)) if rng.random() < 0.1 else None,
            )
        )
    return requests


def with_answer(
    kv: dict[str, Any] | None, rid: str, share: float = 0.3
) -> dict[str, Any] | None:
    """The options, for some requests with an answer that stays whole.

    Drawn apart from the rest, so that the other draws are what they were.
    """
    rng = random.Random(f"answer {rid}")
    if rng.random() >= share or not (kv or {}).get("enabled", True):
        return kv
    return {**(kv or {}), "answer": rng.choice([0, 16, 40, 150, 1 << 30])}


def with_delay(
    kv: dict[str, Any] | None, rid: str, setting: Setting
) -> dict[str, Any] | None:
    """The options, in settings with a delay for some requests with another one."""
    rng = random.Random(f"delay {rid}")
    if not setting.delay or rng.random() >= 0.4 or not (kv or {}).get("enabled", True):
        return kv
    return {**(kv or {}), "delay": rng.choice([0, 1, 15, 40, 100])}


def draw_conversations(rng: random.Random, name: str, count: int) -> list[Request]:
    """First turns, so short that a pool holds what a dozen of them leave."""
    shared = [rng.randrange(2, VOCAB) for _ in range(300)]
    options: list[dict[str, Any] | None] = [
        *(None, None, {"rate": 8}, {"rate": 8}, {"rate": 8}, {"rate": 2}),
        *({"budget": 48}, {"budget": 96}, {"rate": 8, **REPORTS}, {"enabled": False}),
    ]
    requests = []
    for i in range(count):
        length = rng.choice([rng.randint(1, 70), *(rng.randint(80, 320),) * 3])
        ids = [rng.randrange(2, VOCAB) for _ in range(length)]
        if rng.random() < 0.5:
            keep = rng.randint(0, min(len(ids), len(shared)))
            ids[:keep] = shared[:keep]
        arrive = rng.randrange(0, 30 * count)
        requests.append(
            Request(
                f"{name}-{i:03}",
                ids,
                max_new=rng.choice([1, 2, 17, 40, 90]),
                kv=with_answer(rng.choice(options), f"{name}-{i:03}"),
                arrive=arrive,
                abort_at=arrive + rng.randrange(60) if rng.random() < 0.1 else None,
                ignore_eos=rng.random() < 0.7,
                priority=rng.randrange(3),
                tenant=rng.choice([None, None, None, "b"]),
            )
        )
    return requests


KEEPS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}, {}, {}, {}, {"resume": True}, {"keep": "compressed"}),
    *({"keep": "whole"}, {"keep": "none"}, {"resume": False}, {"keep": "all"}),
)


def draw_turn(
    rng: random.Random, name: str, requests: list[Request], outputs: dict[str, Output]
) -> list[Request]:
    """What the clients of a load send next: one turn more, some of them two forks.

    A few have edited their history. Prompts of the whole pool and more are left out.
    """
    turn = []
    for request in requests:
        out = outputs[request.rid]
        if request.logprob_start is not None or not out.ids:
            continue
        for _ in range(1 + (rng.random() < 0.25)):
            ids = request.ids + out.ids
            if rng.random() < 0.1:
                ids[rng.randrange(len(ids))] = 1
            new = rng.choice([0, 1, 15, 16, 33, 60, 120])
            ids = ids + [rng.randrange(2, VOCAB) for _ in range(new)]
            kv = {**(request.kv or {}), **rng.choice(KEEPS)}
            arrive = rng.randrange(0, 30 * len(requests))
            aborted = rng.random() < 0.1
            if rng.random() < 0.1:
                kv["budget"], kv["rate"] = rng.choice([48, 96, 192]), None
            turn.append(
                dataclasses.replace(
                    request,
                    rid=f"{name}-{len(turn):03}",
                    ids=ids,
                    max_new=rng.choice([1, 2, 17, 40, 90]),
                    kv=kv or None,
                    arrive=arrive,
                    abort_at=arrive + rng.randrange(0, 40) if aborted else None,
                )
            )
    rng.shuffle(turn)
    return turn[: len(requests)]


class Pauses:
    """Pause and continue now and then, in both modes."""

    def __init__(self, server: InProcessScheduler, rng: random.Random) -> None:
        self.server, self.rng, self.until = server, rng, -1

    def __call__(self, now: int) -> None:
        """At every poll."""
        from sglang.srt.managers import io_struct

        if self.until >= 0 and now >= self.until:
            self.end()
        elif self.until < 0 and self.rng.random() < 0.03:
            mode = self.rng.choice(["in_place", "retract"])
            self.server.sch.pause_generation(
                io_struct.PauseGenerationReqInput(mode=mode)
            )
            self.until = now + self.rng.randint(1, 5)

    def end(self) -> None:
        """Also behind a load: one that began when all was served outlasts it.

        The next load would wait for ever, and no watch looks at a server that pauses.
        """
        from sglang.srt.managers import io_struct

        self.until = -1
        self.server.sch.continue_generation(
            io_struct.ContinueGenerationReqInput(torch_empty_cache=False)
        )


def apply(server: InProcessScheduler, setting: Setting) -> None:
    """Bring the server into a setting; it is idle."""
    from sglang.srt.managers import scheduler as stock

    server.set_radix(setting.radix)
    server.set_overlap(setting.overlap)
    server.set_priority(setting.priority)
    server.set_chunk(setting.chunk, setting.chunks)
    server.sch.prefill_decode_interval = setting.sglang_turns
    stock.TEST_RETRACT, stock.TEST_RETRACT_INTERVAL = setting.retract, 7
    runtime = server.allocator.get_kvcache().runtime
    options = dataclasses.replace(
        runtime.options,
        interval=setting.interval,
        turns=setting.turns,
        delay=setting.delay,
    )
    options = dataclasses.replace(
        options, sessions=bool(setting.sessions), sessions_host=setting.host
    )
    runtime.state.options = runtime.pass_scheduler.options = options
    runtime.turns.tokens = setting.turn_tokens or TURN_TOKENS
    store = make_store(server, setting.host) if setting.sessions else None
    server.sch.tree_cache.sessions = store


def serve(
    server: InProcessScheduler,
    audit: PageAudit,
    setting: Setting,
    name: str,
    seed: int,
    requests_a_load: int = REQUESTS,
) -> dict[str, int]:
    """One load; an AssertionError or whatever SGLang raises if anything is wrong."""
    apply(server, setting)
    if setting.sessions:
        # In so small a pool nobody would be waited for.
        server.sch.tree_cache.expected.step_tokens = 16
    rng = random.Random(f"{name} {seed}")
    if setting.sessions:
        requests = draw_conversations(rng, f"{seed:03}", requests_a_load // 3)
    else:
        requests = draw(rng, f"{seed:03}", setting, requests_a_load)
    pauses = Pauses(server, rng) if setting.pause else None

    def on_poll(now: int) -> None:
        if pauses is not None:
            pauses(now)
        audit.check(now)
        counts["borrowed"] += any(it.borrowers for it in tree.sessions or ())

    tree = server.sch.tree_cache
    counts = dict.fromkeys((*COUNTED, "requests", "tokens", "aborted", "refused"), 0)
    counts |= {"interrupted": 0, "retractions": 0, "resumed": 0, "evicted": 0}
    counts |= {"borrowed": 0, "shared": -audit.shared.taken, "brought_back": 0}
    server.on_poll = on_poll
    outputs: dict[str, Output] = {}
    for turn in range(1 + setting.sessions):
        if turn:
            requests = draw_turn(rng, f"{seed:03}.{turn}", requests, outputs)
        outputs = server.serve(requests)
        if pauses is not None and pauses.until >= 0:
            pauses.end()
        for request in requests:
            judge(request, outputs[request.rid], counts)
        held = tree.evictable_size()
        assert tree.protected_size() == 0
        assert server.allocator.available_size() + held == POOL
        if tree.sessions is not None:
            check_store(tree.sessions)
    if tree.sessions is not None:
        counts["resumed"] += tree.sessions.hits
        counts["evicted"] += tree.sessions.evicted
        if tree.sessions.host is not None:
            counts["brought_back"] += tree.sessions.host.brought_back
    server.flush()
    assert server.allocator.available_size() == POOL
    assert not tree.sessions
    counts["shared"] += audit.shared.taken
    return counts


def check_store(store: SessionStore) -> None:
    """Nothing runs: nobody borrows, and what the store counts is there."""
    snapshots = list(store)
    assert store.tokens == sum(snapshot.packed for snapshot in snapshots)
    assert not any(snapshot.borrowers for snapshot in snapshots)
    if (shelf := store.host) is not None:
        taken = sorted(slot for slots in shelf._slots.values() for slot in slots)
        assert sorted([*taken, *shelf._free]) == list(range(shelf.pages))
        assert not any(snapshot in shelf for snapshot in snapshots)


def judge(request: Request, out: Output, counts: dict[str, int]) -> None:
    """A request ended in a way that its sender can understand, or was aborted."""
    finish = out.finish or {}
    status, kind = finish.get("status_code"), finish.get("type")
    assert out.finish is not None or request.abort_at is not None, request.rid
    counts["requests"] += 1
    counts["tokens"] += len(out.ids)
    counts["retractions"] += out.retractions
    if out.kv:
        for name in COUNTED:
            counts[name] += out.kv[-1][name]
    if kind in ("length", "stop"):
        # SGLang may deliver a token where none was asked for.
        assert len(out.ids) <= max(request.max_new, 1), (request.rid, len(out.ids))
        fits = len(request.ids) + request.max_new + 48 < POOL
        if fits and request.ignore_eos:
            least = request.max_new
            assert least <= len(out.ids) <= max(least, 1), (request.rid, len(out.ids))
        return
    if request.abort_at is not None and status is None:
        counts["aborted"] += 1
        return
    assert status in (400, 503), (request.rid, finish)
    counts["refused" if status == 400 else "interrupted"] += 1
    length = len(request.ids) + len(out.ids)
    bad = is_bad(request.kv or {})
    assert bad or length + 17 >= POOL, (request.rid, length, finish)


def is_bad(kv: dict[str, Any]) -> bool:
    """Whether options are ones that must be refused."""
    whole = not kv.get("enabled", True)
    lossy = kv.get("keep") == "compressed" or kv.get("resume")
    return (
        kv.get("rate") == 0.5
        or kv.get("budget") == 1 << 63
        or "bud" in kv
        or kv.get("keep") == "all"
        or bool(whole and (lossy or kv.get("budget") or kv.get("rate")))
        or bool(kv.get("resume") and kv.get("report_tokens"))
    )


def main() -> None:
    """Serve all seeds in all settings; the report holds counts, or the traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.fuzz")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 2))
    parser.add_argument("--requests", type=int, default=REQUESTS, help="a load")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with audited(POOL, kv_compress_sessions=True) as (server, audit):
        none = ("loads", "audits")
        report |= {name: dict.fromkeys(none, 0) for name in args.settings}
        # Seed by seed: what is cut short has still been through every setting.
        for seed, name in itertools.product(range(*args.seeds), args.settings):
            begin, total = time.monotonic(), report[name]
            try:
                about = (SETTINGS[name], name, seed, args.requests)
                counts = serve(server, audit, *about)
            except BaseException:
                report["failed"] = [name, seed, traceback.format_exc()]
                args.out.write_text(json.dumps(report))
                raise
            total["loads"] += 1
            total["audits"], audit.audits = total["audits"] + audit.audits, 0
            for key, value in counts.items():
                total[key] = total.get(key, 0) + value
            line = f"{name} {seed}: {time.monotonic() - begin:.1f} s {counts}"
            print(line, file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
