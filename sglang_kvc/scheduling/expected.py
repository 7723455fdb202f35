"""Room for conversations that are expected to go on, and the order of the queue.

A prompt that starts from nothing takes its memory from what was used longest ago. Where
conversations do not all fit, that is the snapshot of one whose user is about to answer,
and then that one starts from nothing, too: each turn computes its whole history again.
So a newcomer waits while snapshots that were left a short time ago take the room, and
who has one goes first. Fewer conversations are served at a time, each to its end.

How long one is expected is learnt from those that came back, or did not. It is at most
as long as what it holds is cheaper than to compute it again: memory that serves all
others, for some steps, against the prompt of one. Time is counted in steps, because
ranks of tensor parallelism count the same. Nobody waits for ever: a newcomer is due
after `PATIENCE` steps without one, and at once where nothing runs.
"""

from __future__ import annotations

from collections import deque

from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.upstream.types import Req

PATIENCE = 256
"""Steps after the last newcomer when the next one is due."""
STEP_TOKENS = 400
"""Prompt tokens that take about as long as a step of decoding. (8B on an H200: 39,000 a
second, steps of 6 to 12 ms. Both times grow with the model.)"""
LEAST_HORIZON = 32
GAPS = 64
"""So many of the last conversations that came back tell how long that takes."""
REMEMBERED = 128
"""Outcomes after which older ones count half."""
SLACK = 1 / 8
"""Of the pool, left free beside what is kept: those who go on grow into it."""


class Expected:
    """What is kept on one server. Ranks agree on all of it.

    Parameters
    ----------
    step_tokens : see `STEP_TOKENS`.

    Attributes
    ----------
    kept : tokens of the snapshots that are expected to be used, as of the last `look`.
    held_back : newcomers that wait for these, as of the last round of admission.
    """

    def __init__(self, step_tokens: int = STEP_TOKENS) -> None:
        self.kept = self.held_back = self._newcomers = 0
        self.step_tokens = step_tokens
        self._step = self._newcomer = 0
        self._returned = self._overdue = 0.0
        self._gaps: deque[int] = deque(maxlen=GAPS)

    @property
    def share(self) -> float:
        """Share of snapshots that were used before they were given up."""
        known = self._returned + self._overdue
        return self._returned / known if known else 0.0

    @property
    def is_due(self) -> bool:
        """Whether the next newcomer goes first, whatever it costs others."""
        return self._step - self._newcomer >= PATIENCE

    def count(self, store: SessionStore) -> None:
        """Count a step that has run."""
        self._step += 1
        store.now = self._step

    def look(self, store: SessionStore, pool_tokens: int, newcomers: int) -> None:
        """Begin a round of admission.

        Parameters
        ----------
        store : the snapshots held.
        pool_tokens : of the pool.
        newcomers : requests that wait and have no snapshot kept for them.
        """
        self.kept = self.held_back = 0
        self._newcomers = newcomers
        if not newcomers:
            return
        usual, dearest = self._usual_gap(), self.share * pool_tokens / self.step_tokens
        for it in store:
            if it.superseded or it.borrowers or it.overdue:
                continue
            horizon = min(usual, dearest * it.fold / it.packed)
            if self._step - it.left_at <= max(horizon, LEAST_HORIZON):
                self.kept += it.packed + len(it.tail)
            else:
                it.overdue = True
                self._overdue += 1
                self._forget_old()

    def came_back(self, snapshot: Snapshot) -> None:
        """Note that a request that starts from a snapshot has come."""
        self._gaps.append(self._step - snapshot.left_at)
        self._returned += 1
        self._forget_old()

    def admitted(self) -> None:
        """Note that a newcomer was admitted."""
        self._newcomer = self._step

    def must_wait(self, rest: float, pool_tokens: int) -> bool:
        """Whether a newcomer has to wait.

        Parameters
        ----------
        rest : tokens that are free or can be evicted once it is admitted.
        pool_tokens : of the pool.
        """
        crowded = self.kept > 0 and rest < self.kept + SLACK * pool_tokens
        if not crowded or self.is_due:
            return False
        self.held_back = self._newcomers
        return True

    def order(self, queue: list[Req], goes_on: set[int]) -> list[Req]:
        """Put who goes on first, else in the order of the queue.

        Parameters
        ----------
        queue : requests that wait.
        goes_on : `id` of those that a snapshot is kept for.
        """
        first: list[Req] = []
        others: list[Req] = []
        for req in queue:
            (first if id(req) in goes_on else others).append(req)
        due = others[:1] if first and self.is_due else []
        return [*due, *first, *others[len(due) :]]

    def _usual_gap(self) -> float:
        """Twice the steps within which nine of ten that came back did so."""
        if not self._gaps:
            return 0.0
        return 2.0 * sorted(self._gaps)[len(self._gaps) * 9 // 10]

    def _forget_old(self) -> None:
        if self._returned + self._overdue > REMEMBERED:
            self._returned /= 2
            self._overdue /= 2
