"""What a real scheduler counts, against what its requests report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_kvc.config import series
from sglang_kvc.eviction.stopwatch import Stopwatch
from sglang_kvc.scheduling.meter import Meter
from tests.doubles import counting_collector
from tests.engine.conversations import keeping_sessions
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.texts import prompt


class Counted:
    """A meter on a scheduler, and what its registry says."""

    def __init__(self, scheduler: InProcessScheduler) -> None:
        self.runtime: Any = scheduler.allocator.get_kvcache().runtime
        self.registry: Any = (collector := counting_collector()).registry
        self.runtime.stopwatch = watch = Stopwatch(on_gpu=False)
        self.meter = Meter(scheduler.sch, collector, watch)
        self.runtime.pass_scheduler.meter = self.meter

    def value(self, one: series.Series, **label: str) -> float:
        """Value of a series."""
        labels = {"model_name": "m", "tp_rank": "0", **label}
        value: float | None = self.registry.get_sample_value(one.name, labels)
        assert value is not None, (one.name, labels)
        return value


@pytest.fixture
def counted(fresh: InProcessScheduler) -> Iterator[Counted]:
    """Of a scheduler whose metrics are off otherwise."""
    started = Counted(fresh)
    yield started
    started.runtime.stopwatch = started.runtime.pass_scheduler.meter = None
    fresh.set_chunk(256)


def test_counters_and_gauges_are_what_requests_report(
    fresh: InProcessScheduler, counted: Counted, model_path: str
) -> None:
    """Prompts compressed whole and between chunks, one not at all, one refused."""
    fresh.set_chunk(256, "always")
    looks = []

    def look(_: int) -> None:
        counted.meter.log()
        logical, resident = map(counted.value, (series.LOGICAL, series.RESIDENT))
        if resident:
            tail, ratio = map(counted.value, (series.TAIL, series.RATIO))
            assert 0 <= tail <= resident <= logical
            assert ratio == logical / resident
            looks.append((logical, resident))

    fresh.on_poll = look
    out = fresh.serve(
        [
            Request("chunks", prompt(model_path, 0, 700), 40),
            Request("whole", prompt(model_path, 1000, 200), 40),
            Request("kept", prompt(model_path, 2000, 80), 8, kv={"enabled": False}),
            Request("wrong", prompt(model_path, 0, 80), 8, kv={"rate": 0.5}),
        ]
    )
    told = {rid: one.kv[-1] for rid, one in out.items() if one.kv}
    assert set(told) == {"chunks", "whole", "kept"}
    passes = {
        kind: counted.value(series.PASSES, kind=kind) for kind in series.PASSES.values
    }
    assert sum(passes.values()) == sum(kv["passes"] for kv in told.values())
    assert passes["chunk"] == told["chunks"]["chunk_passes"] == 2
    assert passes["prompt"] == 2
    assert passes["decode"] >= 2
    # Each pass moves a budget, of 64 tokens or more.
    assert counted.value(series.MOVED) >= 4 * sum(passes.values())
    assert counted.value(series.SECONDS) > 0
    assert counted.value(series.DEFERRED) == 0
    refused = [counted.value(series.REFUSED, reason=it) for it in series.QUEUE_REASONS]
    assert dict(zip(series.QUEUE_REASONS, refused, strict=True)) == {
        **dict.fromkeys(series.QUEUE_REASONS, 0),
        "options": 1,
    }
    assert max(logical / resident for logical, resident in looks) > 2
    assert max(logical for logical, _ in looks) > 900
    # Nothing runs now.
    for one in (series.LOGICAL, series.RESIDENT, series.TAIL):
        assert counted.value(one) == 0
    ratio = counted.value(series.RATIO)
    assert ratio != ratio


def test_gauges_of_a_single_request_are_its_own(
    fresh: InProcessScheduler, counted: Counted, model_path: str
) -> None:
    """At the poll before its end: what it reports then, a step later."""
    seen: list[tuple[float, float]] = []

    def look(_: int) -> None:
        counted.meter.log()
        values = counted.value(series.LOGICAL), counted.value(series.RESIDENT)
        if values[0]:
            seen.append(values)

    fresh.on_poll = look
    out = fresh.serve([Request("one", prompt(model_path, 0, 200), 30)])
    last = out["one"].kv[-1]
    assert abs(seen[-1][0] - last["logical_tokens"]) <= 1
    assert abs(seen[-1][1] - last["resident_tokens"]) <= 1


def test_deferred_passes_are_counted(
    fresh: InProcessScheduler,
    counted: Counted,
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = counted.runtime.pass_scheduler
    take, missed = passes._take_pages, []

    def scarce(batch: Any, tokens: int) -> Any:
        if len(missed) < 3:
            missed.append(tokens)
            return None
        return take(batch, tokens)

    monkeypatch.setattr(passes, "_take_pages", scarce)
    out = fresh.serve([Request("one", prompt(model_path, 0, 200), 20)])
    assert out["one"].kv[-1]["deferred_passes"] == counted.value(series.DEFERRED) == 3
    assert counted.value(series.PASSES, kind="prompt") == 0


def test_snapshots_are_counted(
    fresh: InProcessScheduler, counted: Counted, model_path: str
) -> None:
    """Held, resumed and evicted; the gauges follow a flush, the counters stay."""

    def shown() -> list[float]:
        names = (series.SNAPSHOTS, series.SNAPSHOT_TOKENS, series.HITS)
        return [counted.value(one) for one in (*names, series.EVICTIONS)]

    with keeping_sessions(fresh):
        ids = prompt(model_path, 26_000, 250)
        out = fresh.serve([Request("one", ids, 20, kv={"budget": 64})])["one"]
        assert shown() == [1, 64, 0, 0]
        more = ids + out.ids + ids[:60]
        fresh.serve([Request("two", more, 20, kv={"budget": 64})])
        # That of the first turn is not dropped before somebody needs the memory.
        assert shown() == [2, 128, 1, 0]
        fresh.sch.tree_cache.evict(EvictParams(num_tokens=1 << 20))
        counted.meter.log()
        assert shown() == [0, 0, 1, 1]
        fresh.serve([Request("three", ids, 20, kv={"budget": 64})])
        fresh.flush()
        counted.meter.log()
        assert shown() == [0, 0, 1, 1]
        fresh.sch.tree_cache.expected.held_back = 3
        counted.meter.log()
        assert counted.value(series.HELD_BACK) == 3
        fresh.serve([Request("four", ids, 20, kv={"budget": 64})])
        assert counted.value(series.HELD_BACK) == 0
