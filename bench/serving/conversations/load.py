"""Sessions of several turns, which follow from a seed alone.

What is drawn for a turn depends on the seed, the session, its branch and the turn; not
on time, and not on what was answered.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

LONGEST_THOUGHT = 4
"""Times the mean: one patient user must not decide how long a run takes."""
LOWEST_TOKEN = 100


@dataclass(frozen=True)
class Shape:
    """Numbers of the load.

    Parameters
    ----------
    sessions, turns : int
    first, user, answer : int
        Tokens of the document, and of what user and model say in each turn.
    think : float
        Mean seconds before a turn, also the first.
    forks : float
        Share of the sessions that go on in two ways from their middle turn on.
    seed : int
    """

    sessions: int
    turns: int
    first: int
    user: int
    answer: int
    think: float
    forks: float
    seed: int = 0

    @property
    def length(self) -> int:
        """Tokens of a whole session at its end."""
        return self.first + self.turns * (self.user + self.answer)

    @property
    def fork_after(self) -> int:
        """The turn from whose end two different ones go on."""
        return self.turns // 2

    @property
    def forked(self) -> int:
        """Sessions that fork."""
        return round(self.sessions * self.forks) if self.fork_after else 0

    @property
    def all_turns(self) -> int:
        """Turns of all sessions and branches."""
        branches = self.forked * (self.turns - self.fork_after)
        return self.sessions * self.turns + branches

    def new(self, turn: int) -> int:
        """Prompt tokens of a turn that no turn before it has had or said."""
        return self.user + (self.first if turn == 1 else 0)

    def record(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


class Load:
    """What every session says and when.

    Parameters
    ----------
    shape : Shape
    vocab : int
        Token ids are below this.
    """

    def __init__(self, shape: Shape, vocab: int) -> None:
        self.shape = shape
        self._low, self._vocab = min(LOWEST_TOKEN, vocab // 4), vocab
        forking = self._rng("forks").sample(range(shape.sessions), shape.forked)
        self._forking = frozenset(forking)

    def _rng(self, *names: object) -> random.Random:
        return random.Random(":".join(map(str, (self.shape.seed, *names))))

    def _tokens(self, count: int, *names: object) -> list[int]:
        return self._rng(*names).choices(range(self._low, self._vocab), k=count)

    def forks(self, session: int) -> bool:
        """Whether a session forks."""
        return session in self._forking

    def said(self, session: int, branch: int, turn: int) -> list[int]:
        """What a turn adds to the history: the user's words, at first a document."""
        return self._tokens(self.shape.new(turn), session, branch, turn)

    def thought(self, session: int, branch: int, turn: int) -> float:
        """Seconds before a turn is sent."""
        mean = self.shape.think
        if not mean:
            return 0.0
        drawn = self._rng("think", session, branch, turn).expovariate(1 / mean)
        return min(drawn, LONGEST_THOUGHT * mean)
