"""Passes are measured, and nobody waits for them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from sglang_kvc.eviction.stopwatch import Stopwatch


class FakeEvent:
    """A CUDA event of a device that has come as far as `reached`."""

    recorded, reached = 0, 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Take the next place on the stream."""
        FakeEvent.recorded += 1
        self.place = FakeEvent.recorded

    def query(self) -> bool:
        """Whether the device has passed it."""
        return self.place <= FakeEvent.reached

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds; an error if one of both is still to come, as in CUDA."""
        assert self.query() and end.query()
        return 500.0 * (end.place - self.place)


def test_only_what_has_ended_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)

    def fail(*_: Any) -> None:
        raise AssertionError("the host waits")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    FakeEvent.recorded = FakeEvent.reached = 0
    watch = Stopwatch(on_gpu=True)
    for _ in range(3):
        with watch.running():
            pass
    assert watch.read() == 0
    FakeEvent.reached = 5  # in the middle of the third
    assert watch.read() == 1.0
    assert watch.read() == 0
    FakeEvent.reached = 6
    assert watch.read() == 0.5


def test_on_a_cpu_it_is_the_time_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    watch = Stopwatch(on_gpu=False)
    assert watch.read() == 0
    with watch.running():
        now = 10.5
    now = 12.0
    assert watch.read() == 0.5
    assert watch.read() == 0
