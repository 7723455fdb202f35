"""Whose turn it is, prompts' or answers'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.patches import (
    scheduler__get_new_batch_prefill_raw,
    scheduler__should_defer_prefill,
)
from sglang_kvc.scheduling.turns import TURN_TOKENS, Turns


def req(done: int, most: int, *, finished: bool = False) -> Any:
    """A request that has `done` of `most` tokens, one more perhaps on its way."""
    return SimpleNamespace(
        output_ids=[7] * done,
        sampling_params=SimpleNamespace(max_new_tokens=most),
        finished=lambda: finished,
    )


def batch(*reqs: Any, prefill: bool = False) -> Any:
    """A batch on the scheduler's side."""
    mode = SimpleNamespace(is_extend=lambda: prefill)
    return SimpleNamespace(reqs=list(reqs), forward_mode=mode)


def scheduler(
    last: Any, *, waiting: int = 1, chunked: Any = None, held_back: int | None = None
) -> Any:
    """SGLang's Scheduler behind a step; `held_back` None: no sessions are kept."""
    queue = [req(0, 9)] * waiting
    tree = SimpleNamespace()
    if held_back is not None:
        tree.expected = SimpleNamespace(held_back=held_back)
    return SimpleNamespace(
        last_batch=last, waiting_queue=queue, chunked_req=chunked, tree_cache=tree
    )


LONG = req(1, 100)
PREFILL, DECODE = batch(prefill=True), batch(LONG)
ANSWERS = batch(*[LONG] * 4)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_so_many_decode_steps_go_between_two_prefills(steps: int) -> None:
    turns, said = Turns(), []
    for last in [None, PREFILL, *[DECODE] * 6, PREFILL, PREFILL, *[DECODE] * 6]:
        said.append(turns.decode_first(scheduler(last), ANSWERS, steps))
    behind = [left > 0 for left in range(steps, steps - 7, -1)]
    assert said[1:] == [*behind, behind[0], *behind]


@pytest.mark.parametrize(
    ("reqs", "waits"),
    [
        ((), False),
        ((req(0, 1),), False),
        ((req(1, 2),), False),
        ((req(0, 2),), True),
        ((req(9, 100, finished=True),), False),
        ((req(0, 1), req(9, 100, finished=True), LONG), True),
    ],
)
def test_a_decode_step_is_for_tokens_that_are_not_on_their_way(
    reqs: tuple[Any, ...], waits: bool
) -> None:
    behind = scheduler(PREFILL, waiting=0)
    assert Turns().decode_first(behind, batch(*reqs), 1) == waits


@pytest.mark.parametrize(
    ("waiting", "chunked", "answers_first"),
    [(3, None, True), (4, None, False), (2, LONG, True), (3, LONG, False)],
)
def test_where_many_wait_the_batch_is_filled_first(
    waiting: int, chunked: Any, answers_first: bool
) -> None:
    behind = scheduler(PREFILL, waiting=waiting, chunked=chunked)
    assert Turns().decode_first(behind, ANSWERS, 2) == answers_first


def test_who_waits_for_conversations_fills_no_batch() -> None:
    for held_back, answers_first in ((0, False), (6, False), (7, True)):
        behind = scheduler(PREFILL, waiting=10, held_back=held_back)
        assert Turns().decode_first(behind, ANSWERS, 2) == answers_first


@pytest.mark.parametrize(("waiting", "steps"), [(3, 2), (4, 2), (3, 0)])
def test_answers_wait_for_a_short_prefill(waiting: int, steps: int) -> None:
    """A long prompt is cut; short ones share a prefill. Not where many wait."""
    turns, short = Turns(), (waiting, steps) == (3, 2)
    for last in (PREFILL, DECODE, DECODE):
        turns.decode_first(scheduler(last, waiting=waiting), ANSWERS, steps)
    assert turns.longest(8192) == (TURN_TOKENS if short else 8192)
    assert turns.longest(256) == 256
    assert turns.takes(0, 10**6), "it is cut"
    assert turns.takes(TURN_TOKENS - 500, 500)
    assert turns.takes(TURN_TOKENS - 500, 501) != short


def runtime(steps: int) -> Any:
    """The part of a server that the hooks use."""
    return SimpleNamespace(
        options=SimpleNamespace(turns=steps),
        turns=Turns(),
        pass_scheduler=SimpleNamespace(waiting_prompt=None),
    )


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_prefilled_in_that_step(steps: int) -> None:
    """On 0.5.17. A started prompt is in no batch then, which the busy check is told."""
    hook, plan, started = scheduler__get_new_batch_prefill_raw.hook, object(), object()
    server, behind = runtime(steps), scheduler(PREFILL, chunked=started)

    def original(scheduler: Any, delayer: Any, running_batch: Any) -> Any:
        assert (delayer, running_batch) == ("delayer", ANSWERS)
        return plan, running_batch

    result = hook(original, server, behind, "delayer", ANSWERS)
    assert result == (None if steps else plan, ANSWERS)
    assert server.pass_scheduler.waiting_prompt is (started if steps else None)


@pytest.mark.parametrize("sglang", [True, False])
@pytest.mark.parametrize("steps", [0, 1])
def test_sglang_may_want_more_steps(sglang: bool, steps: int) -> None:
    """From 0.5.22 on; and each is asked in every step, because each counts."""
    server = runtime(steps)
    for last, ours in ((PREFILL, steps > 0), (DECODE, False), (PREFILL, steps > 0)):
        hook = scheduler__should_defer_prefill.hook
        assert hook(sglang, server, scheduler(last), ANSWERS) == (sglang or ours)
