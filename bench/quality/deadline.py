"""The time of a run: what an engine may take of it, and what still fits into that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

START_GUESS = 60.0
"""Seconds that starting an engine is taken to cost before the first one did."""

Clock = Callable[[], float]


class Deadline:
    """Shares the time until `end` among engines, and learns what they take of it.

    Parameters
    ----------
    clock : callable
        Seconds, from any beginning.
    end : float or None
        When everything has to be over, on that clock; None: never.
    start_cost : float
        Seconds that the first engine is taken to need until it is there.
    """

    def __init__(
        self,
        clock: Clock = time.monotonic,
        end: float | None = None,
        start_cost: float = START_GUESS,
    ) -> None:
        self.clock, self.end, self.start_cost = clock, end, start_cost
        # By engine: when its share is over. And those that are there.
        self._stops: dict[str, float] = {}
        self._started: set[str] = set()
        # By kind of question, of the engine that was started last.
        self._latest: dict[str, float] = {}

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Make one that ends so many seconds from now; None: never."""
        return cls(end=None if seconds is None else time.monotonic() + seconds)

    def share_of(self, engines: Sequence[str]) -> Share:
        """Share of the time that the first of the engines may take.

        An engine keeps its share from turn to turn. What it leaves is for all that
        still come; if none does, it is for itself.

        Parameters
        ----------
        engines : sequence of str
            Those of all turns that are left, this one's first.
        """
        mine = engines[0]
        return Share(self, mine, self._stop(mine, set(engines)))

    def _stop(self, mine: str, left: set[str]) -> float | None:
        if self.end is None:
            return None
        new = left - self._stops.keys() - {mine}
        if mine not in self._stops or not new:
            now = self.clock()
            self._stops[mine] = now + (self.end - now) / (1 + len(new))
        return self._stops[mine]

    def learn(self, costs: Mapping[str, float]) -> None:
        """Take in what questions have cost, seconds by kind."""
        self._latest |= costs

    def is_started(self, engine: str) -> bool:
        """Whether an engine is there already."""
        return engine in self._started

    def start(self, engine: str, seconds: float) -> None:
        """Take in that an engine is there, and what that has cost.

        What questions have cost another one says nothing about it.
        """
        self._started.add(engine)
        self.start_cost, self._latest = seconds, {}

    def expected(self, kinds: Iterable[str]) -> float:
        """Seconds that questions of these kinds should take; 0 for unknown kinds."""
        return sum(self._latest.get(kind, 0.0) for kind in set(kinds))


@dataclass
class Share:
    """A turn of an engine.

    Attributes
    ----------
    deadline : Deadline
    engine : str
    stop : float or None
        When its share is over; None: never.
    late : bool
        Something did not fit. Then nothing else does in this turn: what is asked first
        matters most.
    """

    deadline: Deadline
    engine: str
    stop: float | None
    late: bool = False

    def room_to_start(self) -> bool:
        """Whether the engine is there, or can be in time.

        One that is there may remember answers, which cost nothing.
        """
        started = self.deadline.is_started(self.engine)
        return started or self._fits(self.deadline.start_cost)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Time what starts the engine, if it is not there yet."""
        begin = self.deadline.clock()
        yield
        if not self.deadline.is_started(self.engine):
            self.deadline.start(self.engine, self.deadline.clock() - begin)

    def room_for(self, kinds: Iterable[str]) -> bool:
        """Whether questions of these kinds still fit, by what the last ones took."""
        self.late = self.late or not self._fits(self.deadline.expected(kinds))
        return not self.late

    def _fits(self, seconds: float) -> bool:
        return self.stop is None or self.deadline.clock() + seconds <= self.stop
