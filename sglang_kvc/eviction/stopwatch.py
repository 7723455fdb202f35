"""Measure passes without waiting for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up how long the device works on what is launched inside `running`.

    Parameters
    ----------
    on_gpu : whether that is a GPU, which is behind the host: a pair of events each
        time, asked later whether it has passed. Else the host does the work.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is launched meanwhile on the current stream."""
        if not self._on_gpu:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._pending.append((first, last))

    def read(self) -> float:
        """Seconds of what has ended since the last call; does not wait for the rest."""
        while self._pending and self._pending[0][1].query():
            first, last = self._pending.popleft()
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds
