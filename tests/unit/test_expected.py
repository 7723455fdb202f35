"""Room that newcomers leave to conversations which are expected to go on."""

from __future__ import annotations

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
from sglang_kvc.sessions.store import SessionStore

POOL, FOLD, PACKED, TAIL = 40_000, 800, 100, 16
DEAREST = POOL * FOLD / PACKED / STEP_TOKENS
"""Steps after which computing the text again is cheaper."""


class Server:
    """An `Expected` with its store, and steps that run."""

    def __init__(self) -> None:
        self.store, self.expected = SessionStore(), Expected()

    def leave(self, name: str, fold: int = FOLD) -> Any:
        """A request ends and leaves a snapshot."""
        snapshot = self.store.make(
            digest=name.encode(),
            fold=fold,
            packed=PACKED,
            offsets=None,
            unit=None,
            passes=1,
        )
        snapshot.grow(range(TAIL))
        self.store.add(snapshot, name)
        return snapshot

    def run(self, steps: int) -> int:
        """Steps, then a round of admission; returns the tokens that are kept."""
        for _ in range(steps):
            self.expected.count(self.store)
        self.expected.look(self.store, POOL, newcomers=3)
        return self.expected.kept

    def teach(self, gap: int, returned: int = 1, lost: int = 0) -> None:
        """Let some come back after `gap` steps, others never."""
        for number in range(returned):
            snapshot = self.leave(f"taught {number}")
            for _ in range(gap):
                self.expected.count(self.store)
            self.expected.came_back(snapshot)
            self.store.forget(f"taught {number}", evicted=False)
        for number in range(lost):
            self.leave(f"lost {number}")
        self.run(int(DEAREST) + 1)
        for number in range(lost):
            self.store.forget(f"lost {number}", evicted=True)


@pytest.fixture
def server() -> Server:
    return Server()


def test_nothing_is_kept_before_anybody_has_come_back(server: Server) -> None:
    """Prompts without a second turn are served as without sessions."""
    for number in range(50):
        server.leave(f"{number}")
        assert server.run(LEAST_HORIZON + 1) == 0
    assert not server.expected.must_wait(0, POOL)
    assert server.expected.share == 0


def test_kept_for_twice_the_usual_time(server: Server) -> None:
    server.teach(gap=100, returned=10)
    server.leave("one")
    assert server.run(0) == PACKED + TAIL
    assert server.run(200) == PACKED + TAIL
    assert server.run(1) == 0
    # Who comes late is expected later from then on.
    assert 0 < server.expected.share < 1


def test_not_longer_than_it_is_worth(server: Server) -> None:
    """What was long, or is packed tightly, is worth more memory."""
    server.teach(gap=10_000, returned=10)
    server.leave("long")
    server.leave("short", fold=FOLD // 4)
    assert server.run(int(DEAREST / 4)) == 2 * (PACKED + TAIL)
    assert server.run(1) == PACKED + TAIL
    # One of eleven did not come back.
    worth = int(DEAREST * 10 / 11)
    assert server.run(worth - int(DEAREST / 4) - 1) == PACKED + TAIL
    assert server.run(1) == 0


def test_worth_less_if_few_come_back(server: Server) -> None:
    server.teach(gap=10_000, returned=10, lost=30)
    assert server.expected.share == pytest.approx(0.25)
    server.leave("one")
    assert server.run(int(DEAREST / 4)) > 0
    assert server.run(1) == 0


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
    assert server.expected.share < 0.1
