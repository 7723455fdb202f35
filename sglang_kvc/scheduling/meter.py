"""Count what a scheduler decides, for ``/metrics``; there is none if they are off.

Counters move where passes are planned and requests refused. Gauges are set where SGLang
sets its own, at its interval: nothing here runs for every request of every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from sglang_kvc.config import series
from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.scheduling.attached import state_of
from sglang_kvc.upstream.collectors import make_counters, make_gauge
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req, Scheduler

if TYPE_CHECKING:
    from sglang_kvc.config.series import Series
    from sglang_kvc.scheduling.refusal import Reason
    from sglang_kvc.scheduling.request_state import PassInFlight
    from sglang_kvc.sessions.store import SessionStore


class Clock(Protocol):
    """Measures passes without waiting for them."""

    def read(self) -> float:
        """Seconds of the passes that have ended since it was read last."""


class Meter:
    """Series of one scheduler, in SGLang's registry and with its labels.

    Parameters
    ----------
    scheduler : SGLang's Scheduler, whose requests are counted.
    collector : its SchedulerMetricsCollector.
    clock : what measures its passes.
    """

    def __init__(self, scheduler: Scheduler, collector: Any, clock: Clock) -> None:
        self._scheduler, self._clock = scheduler, clock

        def gauge(one: Series) -> Any:
            return make_gauge(collector, one.name, one.text)

        def counters(one: Series, values: tuple[str, ...] = ()) -> dict[str, Any]:
            return make_counters(collector, one.name, one.text, one.label, values)

        self._logical, self._resident = gauge(series.LOGICAL), gauge(series.RESIDENT)
        self._ratio, self._tail = gauge(series.RATIO), gauge(series.TAIL)
        self._passes = counters(series.PASSES, series.PASSES.values)
        self._deferred = counters(series.DEFERRED)[""]
        self._seconds = counters(series.SECONDS)[""]
        self._moved = counters(series.MOVED)[""]
        self._refused = counters(series.REFUSED, series.QUEUE_REASONS)
        self._snapshots = gauge(series.SNAPSHOTS)
        self._snapshot_tokens = gauge(series.SNAPSHOT_TOKENS)
        self._hits = counters(series.HITS)[""]
        self._evictions = counters(series.EVICTIONS)[""]
        self._in_host = gauge(series.IN_HOST)
        self._brought_back = counters(series.BROUGHT_BACK)[""]
        self._held_back = gauge(series.HELD_BACK)
        self._counted = (0, 0, 0)
        self._shown = (0, 0, 0)
        self._show(*self._shown)
        self._show_sessions()

    def planned(self, launched: list[PassInFlight]) -> None:
        """Count the passes of a step."""
        for one in launched:
            self._passes[one.decision.phase.name.lower()].inc()
        pages = sum(one.decision.packed_new for one in launched) // PAGE_SIZE
        self._moved.inc(pages)
        self._read_clock()

    def deferred(self) -> None:
        """Count a pass that found no free pages."""
        self._deferred.inc()

    def refused(self, reason: Reason) -> None:
        """Count a request that is not served."""
        self._refused[reason.label].inc()

    def log(self) -> None:
        """Look at all running requests, when SGLang sets its gauges."""
        logical = resident = tail = 0
        for req in self._running():
            state = state_of(req)
            if state is None or not UPSTREAM.holds_memory(req):
                continue
            length = max(UPSTREAM.committed_len(req), state.fold)
            logical += length
            resident += state.resident(length)
            tail += length - state.fold
        self._show(logical, resident, tail)
        self._show_sessions()
        self._read_clock()

    def rest(self) -> None:
        """Show that nothing runs; called at every turn of an idle scheduler."""
        if self._shown != (0, 0, 0):
            self._show(0, 0, 0)
        self._show_sessions()
        self._read_clock()

    def _running(self) -> Iterator[Req]:
        """Requests in SGLang's batches and a started prompt, once each."""
        scheduler, seen = self._scheduler, set()
        batches = (scheduler.running_batch, scheduler.last_batch)
        reqs = [req for batch in batches if batch is not None for req in batch.reqs]
        for req in (*reqs, scheduler.chunked_req):
            if req is not None and id(req) not in seen:
                seen.add(id(req))
                yield req

    def _show(self, logical: int, resident: int, tail: int) -> None:
        self._shown = (logical, resident, tail)
        self._logical.set(logical)
        self._resident.set(resident)
        self._ratio.set(logical / resident if resident else float("nan"))
        self._tail.set(tail)

    def _show_sessions(self) -> None:
        tree = self._scheduler.tree_cache
        store: SessionStore | None = tree.sessions
        self._held_back.set(tree.expected.held_back if store is not None else 0)
        self._snapshots.set(len(store) if store is not None else 0)
        self._snapshot_tokens.set(store.tokens if store is not None else 0)
        shelf = store.host if store is not None else None
        self._in_host.set(len(shelf) if shelf is not None else 0)
        if store is not None:
            hits, evicted, returned = self._counted
            brought_back = shelf.brought_back if shelf is not None else 0
            self._counted = (store.hits, store.evicted, brought_back)
            self._hits.inc(store.hits - hits)
            self._evictions.inc(store.evicted - evicted)
            self._brought_back.inc(brought_back - returned)

    def _read_clock(self) -> None:
        seconds = self._clock.read()
        if seconds:
            self._seconds.inc(seconds)
