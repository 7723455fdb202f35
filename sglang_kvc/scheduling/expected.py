"""Room for conversations that are expected to go on, and the order of the queue.

A prompt that starts from nothing takes its memory from what was used longest ago. Where
conversations do not all fit, that is the snapshot of one whose user is about to answer,
and then that one starts from nothing, too: each turn computes its whole history again.
So a newcomer waits while snapshots that were left a short time ago take the room, and
who has one goes first. Fewer conversations are served at a time, each to its end.

How long one is expected is learnt from those that came back, or did not (`returns`). It
is as long as what it holds is cheaper than to compute it again: memory that serves all
others, for some steps, against the prompt of one. Time is counted in steps of decoding,
which a prompt takes many of, because ranks of tensor parallelism count the same. Nobody
waits for ever: a newcomer is due after `PATIENCE` steps without one, and at once where
nothing runs.
"""

from __future__ import annotations

from sglang_kvc.scheduling.returns import Returns
from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.store import SessionStore
from sglang_kvc.upstream.types import Req

PATIENCE = 512
"""Steps after the last newcomer when the next one is due."""
STEP_TOKENS = 400
"""Prompt tokens that take about as long as a step of decoding. (8B on an H200: 39,000 a
second, steps of 6 to 12 ms. Both times grow with the model.)"""
LEAST_HORIZON = 32
SLACK = 1 / 8
"""Of the pool, left free beside what is kept: those who go on grow into it."""


class Expected:
    """What is kept on one server. Ranks agree on all of it.

    Parameters
    ----------
    step_tokens : see `STEP_TOKENS`.

    Attributes
    ----------
    returns : what is known of those that came back, or did not.
    kept : tokens of the snapshots that are expected to be used, as of the last `look`.
    held_back : newcomers that wait for these, as of the last round of admission.
    """

    def __init__(self, step_tokens: int = STEP_TOKENS) -> None:
        self.returns = Returns()
        self.kept = self.held_back = self._newcomers = 0
        self.step_tokens = step_tokens
        self._step = self._newcomer = 0

    @property
    def is_due(self) -> bool:
        """Whether the next newcomer goes first, whatever it costs others."""
        return self._step - self._newcomer >= PATIENCE

    def count(self, store: SessionStore, tokens: int) -> None:
        """Count a step that has run, and the prompt `tokens` that it has computed."""
        self._step += 1 + tokens // self.step_tokens
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
        pending = [
            it for it in store if not (it.superseded or it.borrowers or it.overdue)
        ]
        self.returns.look(pending, self._step)
        over = []
        for it in pending:
            worth = pool_tokens * it.fold / (it.packed * self.step_tokens)
            horizon = self.returns.horizon(it, worth)
            if self._step - it.left_at <= max(horizon, LEAST_HORIZON):
                self.kept += it.packed + len(it.tail)
            else:
                over.append(it)
        for it in over:
            self.returns.gave_up(it, self._step)

    def came_back(self, snapshot: Snapshot) -> None:
        """Note that a request that starts from a snapshot has come."""
        self.returns.came_back(snapshot, self._step)

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
