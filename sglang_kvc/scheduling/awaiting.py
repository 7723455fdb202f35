"""Snapshots stay for those in the queue who will start from them.

The prefix tree gives up what was used longest ago. Where conversations take turns in a
queue, that is what the next ones in the queue are about to start from: if the pool does
not hold them all, each is given up just before its turn, and none is ever used. So the
tree's nodes are locked for the requests at the head of the queue, as they will be when
these run. Admission finds less room meanwhile: fewer requests run, and more of them
compute only what is new.

Such a loan is soft. Memory that is needed at once (a decode step's, a pass's, that of a
prompt which nothing runs beside) ends loans, those of the last in the queue first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_kvc.scheduling.attached import attach_await, may_await
from sglang_kvc.scheduling.expected import Expected
from sglang_kvc.scheduling.lookup import find_for_queued
from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.tree import SnapshotTree
from sglang_kvc.upstream.types import Req

SHARE = 0.75
"""Of the pool that may be lent, so that enough requests can run."""
PROMPTS = 2
"""So many of the longest prompts that wait and start from nothing fit beside it."""
LOOK = 256
"""Requests of the queue that are looked at in a round."""


@dataclass(frozen=True)
class _Loan:
    req: Req
    snapshot: Snapshot
    lock: Any
    tokens: int


class Awaiting:
    """Loans to waiting requests, in the order of the queue. Ranks agree on all of it.

    Parameters
    ----------
    tree : whose nodes are locked.
    expected : is told who comes back.

    Attributes
    ----------
    tokens : of the pool, that all loans keep from being evicted.
    """

    def __init__(self, tree: SnapshotTree, expected: Expected) -> None:
        self.tokens = 0
        self._tree, self._expected = tree, expected
        self._loans: dict[int, _Loan] = {}

    def __len__(self) -> int:
        """Loans."""
        return len(self._loans)

    @property
    def who(self) -> set[int]:
        """`id` of the requests that have a loan."""
        return set(self._loans)

    def update(self, queue: Sequence[Req], pool_tokens: int) -> None:
        """Begin a round of admission: end loans of who waits no more, make new ones.

        Parameters
        ----------
        queue : requests that wait, the next one first.
        pool_tokens : tokens of the pool.
        """
        if not self._loans and not self._tree.sessions:
            return
        ahead = queue[:LOOK]
        waiting = {id(req) for req in ahead}
        for key in [key for key in self._loans if key not in waiting]:
            self._end(key)
        room = self._room(ahead, pool_tokens)
        while self._loans and self.tokens > room:
            self._end(next(reversed(self._loans)))
        for req in ahead:
            if self.tokens >= room:
                break
            if id(req) not in self._loans and may_await(req):
                self._lend(req)

    def _room(self, ahead: Sequence[Req], pool_tokens: int) -> int:
        lengths = (
            len(req.origin_input_ids) + len(req.output_ids)
            for req in ahead
            if id(req) not in self._loans
        )
        rest = pool_tokens - PROMPTS * max(lengths, default=0)
        return min(int(pool_tokens * SHARE), rest)

    def _lend(self, req: Req) -> None:
        hit = find_for_queued(self._tree, req)
        if hit is None:
            # It is looked up once more, when it is admitted.
            attach_await(req, False)
            return
        self._expected.came_back(hit.snapshot)
        before = self._tree.evictable_size()
        lock = self._tree.hold(hit.node)
        tokens = before - self._tree.evictable_size()
        self.tokens += tokens
        hit.snapshot.borrowers += 1
        self._loans[id(req)] = _Loan(req, hit.snapshot, lock, tokens)

    def spare(self, tokens: int) -> None:
        """End loans until so many more tokens can be evicted, the last one first."""
        if not self._loans:
            return
        enough = self._tree.evictable_size() + tokens
        while self._loans and self._tree.evictable_size() < enough:
            self._give_up(next(reversed(self._loans)))

    def spare_one(self, but: Req) -> bool:
        """End the last loan that is not of `but`; whether there was one."""
        for key in reversed(self._loans):
            if key != id(but):
                self._give_up(key)
                return True
        return False

    def spare_all(self, but: Req) -> None:
        """End all loans but that of `but`."""
        while self.spare_one(but):
            pass

    def end(self, req: Req) -> None:
        """End the loan of a request, if it has one."""
        if id(req) in self._loans:
            self._end(id(req))

    def forget(self) -> None:
        """The tree was emptied, and all locks with it."""
        for loan in self._loans.values():
            loan.snapshot.borrowers -= 1
        self._loans.clear()
        self.tokens = 0

    def _give_up(self, key: int) -> None:
        # It would be ended again in the next step.
        attach_await(self._loans[key].req, False)
        self._end(key)

    def _end(self, key: int) -> None:
        loan = self._loans.pop(key)
        loan.snapshot.borrowers -= 1
        self.tokens -= loan.tokens
        self._tree.let_go(loan.lock)
