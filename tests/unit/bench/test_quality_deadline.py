"""The time of a quality run: shares of engines, and what fits into them."""

from __future__ import annotations

import time

import pytest

from bench.quality.deadline import START_GUESS, Deadline


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def make(seconds: float | None, start_cost: float = 0.0) -> tuple[Clock, Deadline]:
    clock = Clock()
    end = None if seconds is None else clock() + seconds
    return clock, Deadline(clock, end, start_cost)


def stop_of(deadline: Deadline, *engines: str) -> float:
    stop = deadline.share_of(engines).stop
    assert stop is not None
    return stop - Clock.now


def test_without_an_end_everything_fits() -> None:
    clock, deadline = make(None, start_cost=1e9)
    share = deadline.share_of(["a", "b"])
    assert share.stop is None and share.room_to_start()
    deadline.learn({"needles": 1e9})
    clock.now += 1e9
    assert share.room_for(["needles"]) and not share.late


def test_engines_share_what_is_left() -> None:
    clock, deadline = make(300)
    assert stop_of(deadline, "a", "b", "c") == 100
    # The first one was done early: the others share what it has left.
    clock.now += 20
    assert stop_of(deadline, "b", "c") == 20 + 140
    clock.now += 200
    assert stop_of(deadline, "c") == 300


def test_systems_of_an_engine_share_one_part() -> None:
    clock, deadline = make(300)
    assert stop_of(deadline, "a", "a", "b", "a") == 150
    clock.now += 100
    # Its next turn goes on with what it was given.
    assert stop_of(deadline, "a", "b", "a") == 150
    assert stop_of(deadline, "b", "a") == 300
    # Nobody else is to come: what is left is its own.
    clock.now += 10
    assert stop_of(deadline, "a") == 300


def test_a_start_that_takes_too_long_is_not_begun() -> None:
    clock, deadline = make(100, start_cost=60)
    # A half each is not enough. The last one has all of it.
    assert not deadline.share_of(["a", "b"]).room_to_start()
    share = deadline.share_of(["b"])
    assert share.room_to_start()
    with share.starting():
        clock.now += 30
    clock.now += 60
    # It is there. Another one is taken to cost as much as this one did.
    assert deadline.share_of(["b"]).room_to_start()
    assert deadline.start_cost == 30
    assert not deadline.share_of(["c"]).room_to_start()


def test_what_fails_to_start_is_not_there() -> None:
    clock, deadline = make(100, start_cost=60)
    share = deadline.share_of(["a"])
    with pytest.raises(RuntimeError), share.starting():
        clock.now += 90
        raise RuntimeError("out of memory")
    assert not share.room_to_start()
    assert deadline.start_cost == 60


def test_room_is_what_the_last_questions_of_a_kind_took() -> None:
    clock, deadline = make(100)
    share = deadline.share_of(["a"])
    assert share.room_for(["needles", "words"]), "nothing is known of them"
    deadline.learn({"needles": 70, "words": 20})
    deadline.learn({"needles": 50})
    assert share.room_for(["needles", "needles", "words"])
    clock.now += 30
    assert share.room_for(["needles", "words"]), "to the very end"
    clock.now += 1
    assert not share.room_for(["needles", "words"])


def test_after_what_did_not_fit_nothing_does_in_this_turn() -> None:
    _, deadline = make(100)
    deadline.learn({"needles": 101, "words": 1})
    share = deadline.share_of(["a"])
    assert share.room_for(["words"]) and not share.late
    assert not share.room_for(["needles"])
    assert not share.room_for(["words"]) and share.late
    assert deadline.share_of(["a"]).room_for(["words"])


def test_an_engine_says_nothing_about_the_next_one() -> None:
    _, deadline = make(100)
    first, second = (deadline.share_of([name]) for name in "ab")
    with first.starting():
        pass
    deadline.learn({"needles": 500})
    # It is there already: nothing is forgotten.
    with first.starting():
        pass
    assert deadline.expected(["needles"]) == 500
    with second.starting():
        pass
    assert second.room_for(["needles"])


def test_it_counts_from_now() -> None:
    assert Deadline.after(None).end is None
    deadline = Deadline.after(50)
    assert deadline.start_cost == START_GUESS
    assert deadline.end is not None
    assert 0 < deadline.end - time.monotonic() <= 50
