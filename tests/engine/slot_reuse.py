"""Rows of the request table that change hands while a step of their old owner runs.

With overlap the result of step k - 1 ends a request whose step k has been launched. Its
row is free then. SGLang hands out the newest row first since 0.5.18, so step k + 1 has
it already. `run_slot_reuse` is a scenario of `stress`: the same load with the newest
row first, and with the oldest first, which here has been free for long.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.upstream.generation import UPSTREAM, Generation22
from tests.engine.inprocess import InProcessScheduler, Output, Request
from tests.engine.tiny_model import VOCAB

AT_ONCE = 6
"""Requests that run together; the table has twice as many rows."""

LATER = 1 << 62
"""A poll that no load reaches; `SlotOrder.look` lets such requests in."""


def reuse_requests(rng: random.Random, count: int) -> list[Request]:
    """Answers that are stopped only by their length."""
    requests = []
    for i in range(count):
        length = rng.choice([20, 75, 100, 130])
        kv = rng.choice([None, {"budget": 48}, {"rate": 2}, {"enabled": False}])
        ids = [rng.randrange(2, VOCAB) for _ in range(length)]
        requests.append(Request(f"s{i:03}", ids, 40, kv=kv))
    return requests


def stopped(requests: list[Request], outputs: dict[str, Output]) -> list[Request]:
    """The requests again, half of them with a token of their answer that ends it.

    What ends by its length SGLang leaves out of the step behind it. A stop comes too
    late for that.
    """
    again = []
    for i, request in enumerate(requests):
        stop = [outputs[request.rid].ids[7 * i % 24]] if i % 2 else []
        arrive = 0 if i < AT_ONCE else LATER
        # Whoever ignores EOS ignores stops.
        again.append(
            dataclasses.replace(request, stop=stop, ignore_eos=not stop, arrive=arrive)
        )
    return again


class SlotOrder:
    """Hands out the newest free row first, or the oldest, on every release.

    Parameters
    ----------
    scheduler : its table is patched while this is entered.
    newest : which of both.

    Attributes
    ----------
    reused : rows given away while the last step of their old owner was running.
    dead_passes : passes in flight whose request was gone.
    """

    def __init__(self, scheduler: InProcessScheduler, *, newest: bool) -> None:
        self.scheduler, self.newest = scheduler, newest
        self.slots = scheduler.sch.req_to_token_pool
        self.reused = self.dead_passes = 0
        self._running: set[int] = set()

    @contextmanager
    def entered(self) -> Iterator[SlotOrder]:
        """For one load."""
        alloc, abandon = self.slots.alloc, RequestState.abandon

        def counted(state: RequestState) -> Any:
            dead = abandon(state)
            self.dead_passes += len(dead)
            return dead

        def ordered(reqs: list[Any]) -> Any:
            self._arrange(sum(not UPSTREAM.holds_memory(req) for req in reqs))
            taken = set(self.slots.free_slots)
            given = alloc(reqs)
            taken -= set(self.slots.free_slots)
            self.reused += len(taken & self._running)
            return given

        self.slots.alloc = ordered
        RequestState.abandon = counted  # type: ignore[method-assign]
        try:
            yield self
        finally:
            del self.slots.alloc
            RequestState.abandon = abandon  # type: ignore[method-assign]

    def _arrange(self, count: int) -> None:
        """Put the next rows where SGLang takes them; those freed last stand last."""
        free = self.slots.free_slots
        at = max(len(free) - count, 0) if self.newest else min(count, len(free))
        older, newer = free[:at], free[at:]
        rest, taken = (older, newer) if self.newest else (newer, older)
        # It takes them from the end since 0.5.18, and from the front before.
        last = isinstance(UPSTREAM, Generation22)
        self.slots.free_slots = rest + taken if last else taken + rest

    def look(self, now: int) -> None:
        """At a poll: let a request in for each one that ended, and abort some.

        The step that runs now keeps its rows until the next poll. Every third request
        is aborted in the step before it is due, so that its pass is launched for it
        when it is dead.
        """
        sch = self.scheduler.sch
        feed = sch.request_receiver
        batch = sch.last_batch if sch.result_queue else None
        reqs = batch.reqs if batch is not None else []
        self._running = set(batch.req_pool_indices_cpu.tolist()) if reqs else set()
        ended = sum(req.finished() for req in reqs) or sch.is_fully_idle()
        for request in feed.waiting[: int(ended)]:
            request.arrive = min(request.arrive, now)
        due = self.scheduler.allocator.get_kvcache().runtime.pass_scheduler.due_lens
        last = {
            req.rid
            for req in reqs
            if UPSTREAM.holds_memory(req)
            and UPSTREAM.committed_len(req) + 1 == due[UPSTREAM.slot(req)]
        }
        for request in feed.requests[::3]:
            if request.rid in last:
                request.abort_at = now


def run_slot_reuse(scheduler: InProcessScheduler, audit: Any) -> dict[str, Any]:
    """Both orders: what differs, and whether the load did what it is for."""
    scheduler.set_overlap(True)
    # The new owner's prompt is packed in its first step, before the old one is settled.
    chunk = scheduler.sch.chunked_prefill_size
    scheduler.set_chunk(4 * chunk)
    requests = reuse_requests(random.Random(3), 80)
    requests = stopped(requests, scheduler.serve(requests))
    report: dict[str, Any] = {}
    results = []
    for name, newest in (("newest", True), ("oldest", False)):
        scheduler.set_radix(True)
        order = SlotOrder(scheduler, newest=newest)

        def on_poll(now: int, order: SlotOrder = order) -> None:
            order.look(now)
            audit.check(now)

        scheduler.on_poll = on_poll
        with order.entered():
            outputs = scheduler.serve([dataclasses.replace(r) for r in requests])
        report[name] = {"reused": order.reused, "dead_passes": order.dead_passes}
        results.append({rid: (out.ids, out.kv) for rid, out in outputs.items()})
    scheduler.set_chunk(chunk)
    reused, rested = results
    report["different"] = [rid for rid in reused if reused[rid] != rested[rid]]
    report["tokens"] = sum(len(ids) for ids, _ in reused.values())
    return report
