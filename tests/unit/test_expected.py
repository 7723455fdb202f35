"""Room that newcomers leave to conversations which are expected to go on."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.scheduling.expected import (
    LEAST_HORIZON,
    PATIENCE,
    SLACK,
    STEP_TOKENS,
    Expected,
)
from sglang_kvc.scheduling.returns import MOST_TURNS, Returns
from sglang_kvc.sessions.store import SessionStore

POOL, FOLD, PACKED, TAIL = 40_000, 800, 100, 16
DEAREST = POOL * FOLD / PACKED / STEP_TOKENS
"""Steps after which computing the text again is cheaper."""


def horizon(share: float, mean: float, worth: float) -> float:
    """Steps after which the chance of a return in the next one is 1 / `worth`.

    Of the share that returns, exp(-t / mean) has not after t steps; found by halving.
    """
    low, high = 0.0, 1e6
    while high - low > 0.01:
        t = (low + high) / 2
        out = share * math.exp(-t / mean)
        pays = out / (out + 1 - share) / mean > 1 / worth
        low, high = (t, high) if pays else (low, t)
    return low


class Server:
    """An `Expected` with its store, and steps that run."""

    def __init__(self) -> None:
        self.store, self.expected = SessionStore(), Expected()

    def leave(self, name: str, fold: int = FOLD, turns: int = 1) -> Any:
        """A request ends and leaves a snapshot."""
        snapshot = self.store.make(
            digest=name.encode(),
            fold=fold,
            packed=PACKED,
            offsets=None,
            unit=None,
            passes=1,
            turns=turns,
        )
        snapshot.grow(range(TAIL))
        self.store.add(snapshot, name)
        return snapshot

    def run(self, steps: int) -> int:
        """Steps, then a round of admission; returns the tokens that are kept."""
        for _ in range(steps):
            self.expected.count(self.store, 0)
        self.expected.look(self.store, POOL, newcomers=3)
        return self.expected.kept

    def teach(self, gap: int, returned: int = 1, lost: int = 0, turns: int = 1) -> None:
        """Let some come back after `gap` steps, others never."""
        for number in range(returned):
            snapshot = self.leave(f"taught {number}", turns=turns)
            for _ in range(gap):
                self.expected.count(self.store, 0)
            self.expected.came_back(snapshot)
            self.store.forget(f"taught {number}", evicted=False)
        for number in range(lost):
            self.leave(f"lost {number}", turns=turns)
        self.run(int(DEAREST) + 2 * gap + 1)
        for number in range(lost):
            self.store.forget(f"lost {number}", evicted=True)
        self.run(0)


@pytest.fixture
def server() -> Server:
    return Server()


def test_nothing_is_kept_before_anybody_has_come_back(server: Server) -> None:
    """Prompts without a second turn are served as without sessions."""
    for number in range(50):
        server.leave(f"{number}")
        assert server.run(LEAST_HORIZON + 1) == 0
    assert not server.expected.must_wait(0, POOL)
    assert server.expected.returns.share(1) == 0


def test_kept_for_twice_the_usual_time(server: Server) -> None:
    server.teach(gap=100, returned=20)
    server.leave("one")
    assert server.run(0) == PACKED + TAIL
    assert server.run(200) == PACKED + TAIL
    assert server.run(1) == 0
    assert 0 < server.expected.returns.share(1) < 1


def test_the_first_who_come_back_are_the_quick(server: Server) -> None:
    """What they take tells nothing, until slower ones had the time to come."""
    together = [server.leave(f"{number}") for number in range(30)]
    others = 10 * (PACKED + TAIL)
    assert server.run(10) == 3 * others
    for number in range(20):
        server.expected.came_back(together[number])
        together[number].borrowers = 1
    # Worth more than these, while the others have not had four times as long.
    assert server.run(29) == others
    assert server.run(1) == 0


def test_not_longer_than_it_is_worth(server: Server) -> None:
    """What was long, or is packed tightly, is worth more memory."""
    server.teach(gap=500, returned=80, lost=10)
    server.leave("long")
    server.leave("short", fold=FOLD // 4)
    assert server.run(LEAST_HORIZON) == 2 * (PACKED + TAIL)
    # A quarter of the text is not worth waiting for 500 steps.
    assert DEAREST / 4 < 500 < DEAREST
    assert server.run(1) == PACKED + TAIL
    returns = server.expected.returns
    kept = int(horizon(returns.share(1), returns.mean, DEAREST))
    assert 500 < kept < 1100
    assert server.run(kept * 7 // 10 - LEAST_HORIZON) == PACKED + TAIL
    assert server.run(kept * 6 // 10) == 0


def test_worth_less_if_few_come_back(server: Server) -> None:
    """The longer nobody has come back, the less likely it is that somebody will."""
    server.teach(gap=100, returned=60, lost=60)
    share = server.expected.returns.share(1)
    assert share == pytest.approx(0.5, abs=0.1)
    server.leave("one")
    kept = horizon(share, 100, DEAREST)
    assert LEAST_HORIZON < kept < 200
    assert server.run(int(kept * 0.9)) > 0
    assert server.run(int(kept * 0.2) + 1) == 0


def test_how_many_turns_a_conversation_had_tells_whether_it_goes_on(
    server: Server,
) -> None:
    """Conversations of three turns come back twice."""
    for turns in (1, 2):
        server.teach(gap=100, returned=20, turns=turns)
    server.teach(gap=100, returned=0, lost=20, turns=3)
    assert server.expected.returns.share(1) > 0.9
    assert server.expected.returns.share(3) < 0.2
    # Of others only what all do is known.
    assert 0.6 < server.expected.returns.share(4) < 0.7
    assert server.expected.returns.share(MOST_TURNS) == server.expected.returns.share(
        99
    )
    for turns in (2, 3):
        server.leave(f"left {turns}", turns=turns)
    assert server.run(LEAST_HORIZON + 60) == PACKED + TAIL


@pytest.mark.parametrize("cut", [300, 600, 2000])
def test_who_comes_too_late_is_not_forgotten(cut: int) -> None:
    """Four of five come back after 300 steps on average, but nobody waits that long."""
    rng, returns, now = random.Random(0), Returns(), 0
    for _ in range(1000):
        gap = rng.expovariate(1 / 300) if rng.random() < 0.8 else math.inf
        now += 40
        snapshot: Any = SimpleNamespace(turns=1, left_at=now - round(min(gap, cut)))
        if gap < cut:
            returns.came_back(snapshot, now)
        else:
            returns.gave_up(snapshot, now)
        returns.look([], now)
    assert 200 < returns.mean < 400
    assert 0.6 < returns.share(1) < 0.9


def test_who_should_have_come_back_tells_something_before_time_is_over(
    server: Server,
) -> None:
    server.teach(gap=100, returned=30)
    before = server.expected.returns.share(2)
    for number in range(20):
        server.leave(f"{number}", turns=2)
    server.run(0)
    assert server.expected.returns.share(2) == pytest.approx(before, abs=0.02)
    assert server.run(40) > 0
    assert not any(it.overdue for it in server.store)
    assert 0.3 < server.expected.returns.share(2) < before / 2
    # And nothing is left of it once they have.
    for snapshot in list(server.store):
        server.expected.came_back(snapshot)
        snapshot.borrowers = 1
    server.run(0)
    assert server.expected.returns.share(2) > 0.95


def test_prompts_take_time(server: Server) -> None:
    server.teach(gap=100, returned=20)
    server.leave("one")
    server.expected.count(server.store, 0)
    assert server.run(0) == PACKED + TAIL
    server.expected.count(server.store, 210 * STEP_TOKENS)
    assert server.run(0) == 0


def test_what_is_lent_or_replaced_is_not_counted(server: Server) -> None:
    """The former is locked, the latter goes before anything else."""
    server.teach(gap=100)
    server.leave("lent").borrowers = 1
    server.leave("replaced").superseded = True
    assert server.run(1) == 0
    # And a use begins anew.
    lent = next(iter(server.store))
    server.run(500)
    lent.borrowers, lent.left_at = 0, server.store.now
    assert server.run(1) == PACKED + TAIL


def test_a_newcomer_waits_until_it_is_due(server: Server) -> None:
    server.teach(gap=PATIENCE)
    server.leave("one")
    server.expected.admitted()
    kept, slack = server.run(1), POOL * SLACK
    expected = server.expected
    assert not expected.must_wait(kept + slack, POOL)
    assert expected.held_back == 0
    assert expected.must_wait(kept + slack - 1, POOL)
    assert expected.held_back == 3
    assert server.run(PATIENCE - 2) and expected.must_wait(0, POOL)
    assert server.run(1) and expected.is_due
    assert not expected.must_wait(0, POOL)
    expected.admitted()
    assert expected.must_wait(0, POOL)


def test_who_goes_on_goes_first(server: Server) -> None:
    """In the order of the queue; a newcomer that is due goes before them."""
    queue: list[Any] = [SimpleNamespace(name=name) for name in "abcde"]
    goes_on = {id(queue[1]), id(queue[3])}

    def names() -> str:
        return "".join(it.name for it in server.expected.order(queue, goes_on))

    assert names() == "bdace"
    server.run(PATIENCE)
    assert names() == "abdce"
    server.expected.admitted()
    assert names() == "bdace"
    assert [it.name for it in server.expected.order(queue, set())] == list("abcde")


def test_what_was_long_ago_counts_less(server: Server) -> None:
    server.teach(gap=1, returned=100, lost=0)
    server.teach(gap=1, returned=0, lost=300)
    assert server.expected.returns.share(1) < 0.1
