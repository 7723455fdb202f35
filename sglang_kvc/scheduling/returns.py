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
ROUNDS, MOST_UNSEEN = 4, 2.0
"""Of the search for the mean of all gaps, and how much it can be above that of those
that were seen."""
FAR = 50.0
"""So many means later nobody comes."""
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
    """How many snapshots of a kind were used, and how many were not.

    Attributes
    ----------
    returned : used; older ones count less.
    over : given up, each as far as it would have been used by then, if all were.
    late : those that nothing is known of yet, likewise by now.
    """

    returned: float = 0.0
    over: float = 0.0
    late: float = 0.0

    def add(self, returned: float = 0.0, over: float = 0.0) -> None:
        """Note one."""
        self.returned += returned
        self.over += over
        if self.returned + self.over > REMEMBERED:
            self.returned /= 2
            self.over /= 2

    def share(self, seen: float, prior: float = 0.0) -> float:
        """Share that is used: what came back, over what would have if all had.

        Parameters
        ----------
        seen : share of those who come back that do before they are given up.
        prior : share of all kinds, if this is one of them.
        """
        weight = PRIOR if prior else 0.0
        whole = self.returned * seen + self.over + self.late + weight
        return min((self.returned + weight * prior) / whole, 1.0) if whole else 0.0


class Returns:
    """What is known of the conversations of one server. Ranks agree on all of it.

    Attributes
    ----------
    mean : steps after which those who come back do; 0 as long as only the quick can.
    """

    def __init__(self) -> None:
        self._all, self._by_turns = Outcomes(), [Outcomes() for _ in range(MOST_TURNS)]
        self._gaps: deque[int] = deque(maxlen=GAPS)
        self._waited: deque[int] = deque(maxlen=GAPS)
        self._begin = 0
        self._usual = self.mean = 0.0
        self._seen = 1.0
        self._shares = [0.0] * MOST_TURNS

    def share(self, turns: int) -> float:
        """Share of snapshots after so many turns that are used."""
        return self._of(turns).share(self._seen, self._all.share(self._seen))

    def came_back(self, snapshot: Snapshot, now: int) -> None:
        """Note that a request that starts from a snapshot has come in step `now`."""
        if not self._gaps:
            self._begin = snapshot.left_at
        self._gaps.append(now - snapshot.left_at)
        self._note(snapshot, returned=1.0)

    def gave_up(self, snapshot: Snapshot, now: int) -> None:
        """Note that nobody is expected to start from a snapshot any more."""
        snapshot.overdue = True
        self._waited.append(now - snapshot.left_at)
        self._note(snapshot, over=self._late(snapshot, now))

    def look(self, pending: Sequence[Snapshot], now: int) -> None:
        """Count those that nothing is known of yet, in step `now`; then ask `horizon`.

        They tell something before their time is over: of a kind of which many are left
        and none has come back, few will.
        """
        self._measure(now)
        for outcomes in self._by_turns:
            outcomes.late = 0.0
        if self.mean:
            for it in pending:
                self._of(it.turns).late += self._late(it, now)
        self._shares = [self.share(turns + 1) for turns in range(MOST_TURNS)]

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
        share, mean = self._shares[min(snapshot.turns, MOST_TURNS) - 1], self.mean
        if not mean:
            return share * worth
        share = min(share, SUREST)
        if worth <= mean:
            return 0.0
        odds = share / (1 - share) * (worth / mean - 1)
        return min(2 * self._usual, mean * math.log(odds)) if odds > 1 else 0.0

    def _of(self, turns: int) -> Outcomes:
        return self._by_turns[min(turns, MOST_TURNS) - 1]

    def _late(self, snapshot: Snapshot, now: int) -> float:
        """Chance that somebody would have come back by now who is to come back."""
        return -math.expm1((snapshot.left_at - now) / self.mean) if self.mean else 1.0

    def _note(self, snapshot: Snapshot, **outcome: float) -> None:
        self._all.add(**outcome)
        self._of(snapshot.turns).add(**outcome)

    def _measure(self, now: int) -> None:
        """How long those who come back take, if that is known already."""
        self._usual, self.mean, self._seen = 0.0, 0.0, 1.0
        if len(self._gaps) < LEAST_GAPS:
            return
        mean = found = max(sum(self._gaps) / len(self._gaps), 1.0)
        if now - self._begin < KNOWN_AFTER * found:
            return
        if self._waited:
            # Who comes later than one is waited for is not seen. Of an exponential
            # distribution that is cut off at c, the mean is m - c / (exp(c / m) - 1).
            cut = sum(self._waited) / len(self._waited)
            for _ in range(ROUNDS):
                unseen = cut / math.expm1(min(cut / mean, FAR))
                mean = min(found + unseen, MOST_UNSEEN * found)
            self._seen = -math.expm1(-cut / mean)
        usual = sorted(self._gaps)[len(self._gaps) * 9 // 10]
        self._usual, self.mean = usual * mean / found, mean
