"""Which conversations go on, and how soon: learnt from those that did, or did not.

Of the snapshots that were left after so many turns a share is used, after a time that
is taken to be exponentially distributed. So the longer nobody has come back, the
likelier nobody will.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_kvc.sessions.snapshot import Snapshot

GAPS = 64
"""So many of the last conversations that came back tell how long that takes."""
LEAST_GAPS, KNOWN_AFTER = 16, 4
"""So few do not, and none do before so many times their mean has passed."""
REMEMBERED = 128
"""Outcomes after which older ones count half."""
MOST_TURNS = 16
"""Conversations that have had more are one kind."""
PRIOR = 4
"""Outcomes of all that weigh as much as those of a number of turns."""
SUREST = 0.98
"""No more than this share is ever expected back."""


@dataclass
class Outcomes:
    """Of snapshots that were left: those that were used, and those that were not.

    Attributes
    ----------
    returned, overdue : older ones count less.
    late : how many of those that nothing is known of yet would have been used by now,
        if all were.
    """

    returned: float = 0.0
    overdue: float = 0.0
    late: float = 0.0

    @property
    def known(self) -> float:
        """Both."""
        return self.returned + self.overdue

    def add(self, returned: bool) -> None:
        """Note one."""
        if returned:
            self.returned += 1
        else:
            self.overdue += 1
        if self.known > REMEMBERED:
            self.returned /= 2
            self.overdue /= 2


class Returns:
    """What is known of the conversations of one server. Ranks agree on all of it."""

    def __init__(self) -> None:
        self._all, self._by_turns = Outcomes(), [Outcomes() for _ in range(MOST_TURNS)]
        self._gaps: deque[int] = deque(maxlen=GAPS)
        self._begin = 0
        self._usual = self._mean = 0.0

    def share(self, turns: int) -> float:
        """Share of snapshots after so many turns that are used."""
        if not self._all.known:
            return 0.0
        alike, of_all = self._of(turns), self._all.returned / self._all.known
        return (alike.returned + PRIOR * of_all) / (alike.known + alike.late + PRIOR)

    def came_back(self, snapshot: Snapshot, now: int) -> None:
        """Note that a request that starts from a snapshot has come in step `now`."""
        if not self._gaps:
            self._begin = snapshot.left_at
        self._gaps.append(now - snapshot.left_at)
        self._note(snapshot, returned=True)

    def gave_up(self, snapshot: Snapshot) -> None:
        """Note that nobody is expected to start from a snapshot any more."""
        snapshot.overdue = True
        self._note(snapshot, returned=False)

    def look(self, pending: Sequence[Snapshot], now: int) -> None:
        """Count those that nothing is known of yet, in step `now`; then ask `horizon`.

        They tell something before their time is over: of a kind of which many are left
        and none has come back, few will.
        """
        self._usual, self._mean = self._gap_times(now)
        for outcomes in self._by_turns:
            outcomes.late = 0.0
        if self._mean:
            for it in pending:
                late = -math.expm1((it.left_at - now) / self._mean)
                self._of(it.turns).late += late

    def horizon(self, snapshot: Snapshot, worth: float) -> float:
        """Steps for which it pays to hold a snapshot from when it was left.

        As long as the chance that somebody comes back in the next step is 1 / `worth`
        or more, and no longer than twice the time in which nine of ten did. While only
        the quick can have come back: `worth`, less if few do.

        Parameters
        ----------
        snapshot : that is held.
        worth : steps in which holding it costs as much as to compute it again.
        """
        share, mean = self.share(snapshot.turns), self._mean
        if not mean:
            return share * worth
        share = min(share, SUREST)
        if worth <= mean or share <= 0:
            return 0.0
        odds = share / (1 - share) * (worth / mean - 1)
        return min(2 * self._usual, mean * math.log(odds)) if odds > 1 else 0.0

    def _of(self, turns: int) -> Outcomes:
        return self._by_turns[min(turns, MOST_TURNS) - 1]

    def _note(self, snapshot: Snapshot, *, returned: bool) -> None:
        self._all.add(returned)
        self._of(snapshot.turns).add(returned)

    def _gap_times(self, now: int) -> tuple[float, float]:
        """Steps within which nine of ten came back, and the mean; zeros if unknown."""
        if len(self._gaps) < LEAST_GAPS:
            return 0.0, 0.0
        mean = max(sum(self._gaps) / len(self._gaps), 1.0)
        if now - self._begin < KNOWN_AFTER * mean:
            return 0.0, 0.0
        return sorted(self._gaps)[len(self._gaps) * 9 // 10], mean
