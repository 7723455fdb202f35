"""What once stopped or hung the server, on a tiny model and a pool of 1,280 tokens.

``python -m tests.engine.faults OUT.json`` runs every scenario in one process and writes
what came of it; `test_faults.py` judges. A scenario that hangs is ended by the liveness
watch, one that kills the scheduler by its exception; the next one goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_kvc.upstream.generation import UPSTREAM
from tests.engine.inprocess import (
    InProcessScheduler,
    Output,
    Request,
    make_server_args,
)
from tests.engine.stress import POOL, STRICT, PageAudit
from tests.engine.tiny_model import ONE_LAYER, VOCAB, write_tiny_model

CHUNK = 512
BEYOND = POOL + 40
"""Tokens that the pool cannot hold uncompressed."""
LONGEST = 4_000
Facts = dict[str, Any]
SCENARIOS: dict[str, Callable[[InProcessScheduler], Facts]] = {}


def scenario(
    run: Callable[[InProcessScheduler], Facts],
) -> Callable[[InProcessScheduler], Facts]:
    """Register a scenario by its name."""
    SCENARIOS[run.__name__] = run
    return run


def ids(length: int, seed: int = 0) -> list[int]:
    """A prompt; prompts of one seed begin alike."""
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


def facts(outputs: dict[str, Output]) -> Facts:
    """By request: tokens, how it ended, and what was reported last."""
    return {
        rid: {
            "tokens": len(out.ids),
            "type": (out.finish or {}).get("type"),
            "status": (out.finish or {}).get("status_code"),
            "message": (out.finish or {}).get("message") or "",
            "cached": out.cached_tokens,
            "retractions": out.retractions,
            **({"kv": out.kv[-1]} if out.kv else {}),
        }
        for rid, out in outputs.items()
    }


@scenario
def budget_beyond_int64(server: InProcessScheduler) -> Facts:
    """A1."""
    budgets = [1 << 62, (1 << 63) - 1, 1 << 63, 10**30, -(1 << 63), -1, 0]
    bad = [
        Request(f"bad{i}", ids(60), 4, kv={"budget": budget})
        for i, budget in enumerate(budgets)
    ]
    return facts(server.serve([*bad, Request("good", ids(60), 4)]))


@contextlib.contextmanager
def slots(server: InProcessScheduler, count: int) -> Iterator[None]:
    """Let only `count` requests run at once, with priority scheduling."""
    server.set_priority(True)
    server.sch.get_num_allocatable_reqs = lambda running, *_, **__: count - running
    try:
        yield
    finally:
        del server.sch.get_num_allocatable_reqs
        server.set_priority(False)


@scenario
def urgent_prompts_in_one_round(server: InProcessScheduler) -> Facts:
    """A2."""
    server.set_chunk(2048)
    slow = [
        Request(f"slow{i}", ids(60, i), 300, kv={"enabled": False}, priority=0)
        for i in range(3)
    ]
    urgent = [
        Request(f"urgent{i}", ids(600, 9 + i), 8, {"budget": 48}, 20, priority=9)
        for i in range(2)
    ]
    with slots(server, 3):
        return facts(server.serve([*slow, *urgent]))


@scenario
def preempted_for_a_prompt_that_is_not_admitted(server: InProcessScheduler) -> Facts:
    """Beside A2: who was preempted for nothing must not be lost."""
    slow = [
        Request(f"slow{i}", ids(200, i), 100, kv={"enabled": False}, priority=i)
        for i in range(4)
    ]
    urgent = [
        Request("urgent0", ids(1200, 9), 8, {"enabled": False}, 12, priority=9),
        Request("urgent1", ids(1800, 10), 8, {"budget": 64}, 14, priority=8),
    ]
    with slots(server, 4):
        return facts(server.serve([*slow, *urgent]))


@scenario
def lengths_around_the_peak(server: InProcessScheduler) -> Facts:
    """B1: every prompt alone on the empty pool, at several rates."""
    found: Facts = {}
    for rate in (2, 4, 8):
        end = min(640 * rate, LONGEST + 1)
        for length in range(560 * rate // 4 * 3, end, 14 * rate + 1):
            server.flush()
            rid = f"{rate}x{length}"
            found |= facts(server.serve([Request(rid, ids(length), 3, {"rate": rate})]))
    return found


def one_after_another(server: InProcessScheduler, requests: list[Request]) -> Facts:
    """Each request on the idle server that the one before has left."""
    found: Facts = {}
    for request in requests:
        found |= facts(server.serve([request]))
    return found


@scenario
def behind_its_own_prefix(server: InProcessScheduler) -> Facts:
    """B2: chunks behind a cached prefix that only the request itself holds."""
    found: Facts = {}
    for whole, rest, rate in ((800, 0, 4), (620, 480, 4), (700, 900, 8), (960, 700, 8)):
        server.flush()
        name = f"{whole}+{rest}"
        found |= one_after_another(
            server,
            [
                Request(f"whole{name}", ids(whole), 3, {"enabled": False}),
                Request(f"long{name}", ids(whole + rest), 40, {"rate": rate}),
            ],
        )
    return found


@scenario
def neither_whole_nor_in_chunks(server: InProcessScheduler) -> Facts:
    """B3."""
    found = one_after_another(
        server,
        [
            Request("prefix", ids(960), 3, {"enabled": False}),
            Request("rate1.5", ids(1000), 40, {"rate": 1.5}),
        ],
    )
    for mode, chunk in (("never", 512), ("never", 2048), ("auto", -1), ("never", 64)):
        server.set_chunk(chunk, mode)
        server.flush()
        for turn in ("first", "again"):
            request = Request(f"{mode}{chunk}{turn}", ids(1100), 20, {"rate": 4})
            found |= facts(server.serve([request]))
    return found


def retracted_when_longer(server: InProcessScheduler, chunk: int) -> Facts:
    """Pause with mode retract once a request has outgrown the pool."""
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
    )

    server.set_chunk(chunk)
    paused: list[int] = []

    def pause(now: int) -> None:
        reqs = server.sch.running_batch.reqs
        if not paused and any(UPSTREAM.committed_len(r) > BEYOND for r in reqs):
            paused.append(now)
            server.sch.pause_generation(PauseGenerationReqInput(mode="retract"))
        elif paused == [now - 3]:
            server.sch.continue_generation(
                ContinueGenerationReqInput(torch_empty_cache=False)
            )

    server.on_poll = pause
    requests = [
        Request("long", ids(100), BEYOND, {"budget": 64}),
        Request("short", ids(40, 3), 900, {"budget": 64}),
    ]
    found = facts(server.serve(requests))
    assert paused
    return found


@scenario
def outgrown_and_retracted(server: InProcessScheduler) -> Facts:
    """B4, where prompts can be compressed between chunks."""
    return retracted_when_longer(server, CHUNK)


@scenario
def outgrown_and_retracted_without_chunks(server: InProcessScheduler) -> Facts:
    """B4, where they cannot."""
    return retracted_when_longer(server, -1)


@scenario
def outputs_longer_than_the_pool(server: InProcessScheduler) -> Facts:
    """C1."""
    # Both at once: together they hold a quarter of the pool.
    small = [
        Request("budget", ids(20), BEYOND, {"budget": 64}),
        Request("rate", ids(20), BEYOND, {"rate": 8}),
    ]
    return facts(server.serve(small)) | one_after_another(
        server,
        [
            Request("whole", ids(20), BEYOND, {"enabled": False}),
            # Two copies fit up to 1,104 tokens; from there on it keeps everything.
            Request("near", ids(500), 1500, {"rate": 2}),
        ],
    )


@scenario
def a_pass_that_cannot_help(server: InProcessScheduler) -> Facts:
    """C3: what another conversation has cached stays."""
    other = Request("other", ids(320, 5), 1, {"enabled": False})
    large = Request("large", ids(880), 60, {"rate": 1.1})
    again = Request("again", ids(340, 5), 1, {"enabled": False})
    return one_after_another(server, [other, large, again])


@scenario
def aborted_between_two_chunks(server: InProcessScheduler) -> Facts:
    """C5."""
    server.set_chunk(64, "never")
    passes = server.allocator.get_kvcache().runtime.pass_scheduler
    pending: list[int] = []
    server.on_poll = lambda now: pending.append(passes.pending_prompt_tokens)
    requests = [
        Request("runs", ids(100, 1), 60, {"budget": 64}),
        Request("gone", ids(700, 2), 8, {"budget": 64}, 6, abort_at=9),
    ]
    found = facts(server.serve(requests))
    return {**found, "pending": pending}


@scenario
def refused_with_logprobs(server: InProcessScheduler) -> Facts:
    """C6."""
    return facts(
        server.serve(
            [
                Request("long", ids(2000), 4, {"enabled": False}, logprob_start=50),
                Request("bad", ids(200), 4, {"rate": 0}, logprob_start=50),
                Request("good", ids(200), 4, logprob_start=150),
            ]
        )
    )


@scenario
def full_pool_beside_a_started_prompt(server: InProcessScheduler) -> Facts:
    """A prompt that waits between chunks must not cost a running request its life."""
    held: list[Any] = []
    allocator = server.allocator
    server.set_radix(False)
    server.set_chunk(128, "always")

    def squeeze(now: int) -> None:
        if now == 8:
            held.append(allocator.alloc(allocator.available_size() - 64))
        if now == 40:
            allocator.free_segment(held.pop(), start_pos=0)

    server.on_poll = squeeze
    os.environ[STRICT] = "0"
    requests = [
        Request("runs", ids(40, 1), 150, {"enabled": False}),
        Request("long", ids(1500, 2), 8, {"budget": 64}, 4),
    ]
    try:
        return facts(server.serve(requests))
    finally:
        os.environ[STRICT] = "1"


def run(name: str, server: InProcessScheduler, audit: PageAudit) -> Facts:
    """One scenario from the same start; a failure is a fact, too."""
    server.set_overlap(True)
    server.set_radix(True)
    server.set_chunk(CHUNK)
    server.on_poll = None
    try:
        found = SCENARIOS[name](server)
        audit.check(0)
        return found
    except BaseException:
        # What a broken scheduler still holds would break the next scenario, too.
        return {"traceback": traceback.format_exc()}


def main(target: str, only: list[str]) -> None:
    """Run the scenarios; one that breaks the scheduler is the last of its process."""
    os.environ[STRICT] = "1"
    report: dict[str, Facts] = {}
    with tempfile.TemporaryDirectory() as folder:
        args = make_server_args(
            write_tiny_model(Path(folder), ONE_LAYER),
            compress=True,
            chunked_prefill_size=CHUNK,
            max_total_tokens=POOL,
            max_running_requests=12,
            kv_compress_min_budget=48,
            kv_compress_interval=32,
        )
        server = InProcessScheduler(args)
        audit = PageAudit(server)
        for name in only or list(SCENARIOS):
            report[name] = run(name, server, audit)
            Path(target).write_text(json.dumps(report))
            if "traceback" in report[name]:
                break


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
