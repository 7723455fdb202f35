"""Who decodes between two prefills."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.patches import (
    scheduler__get_new_batch_prefill_raw,
    scheduler__should_defer_prefill,
)
from sglang_kvc.scheduling.turns import answers_wait, decode_first


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


LONG = req(1, 100)


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
    assert answers_wait(batch(*reqs)) == waits


def test_decode_goes_first_behind_a_prefill_only() -> None:
    for last, first in (
        (None, False),
        (batch(prefill=False), False),
        (batch(prefill=True), True),
    ):
        scheduler: Any = SimpleNamespace(last_batch=last)
        assert decode_first(scheduler, batch(LONG)) == first
        assert not decode_first(scheduler, batch())


def test_nothing_is_prefilled_in_that_step() -> None:
    """And in any other, SGLang decides."""
    hook, plan = scheduler__get_new_batch_prefill_raw.hook, object()
    running, started = batch(LONG), object()

    def original(scheduler: Any, delayer: Any, running_batch: Any) -> Any:
        assert (delayer, running_batch) == ("delayer", running)
        return plan, running

    for prefill, found in ((True, None), (False, plan)):
        passes = SimpleNamespace(waiting_prompt=None)
        runtime = SimpleNamespace(pass_scheduler=passes)
        scheduler = SimpleNamespace(
            last_batch=batch(prefill=prefill), chunked_req=started
        )
        result = hook(original, runtime, scheduler, "delayer", running)
        assert result == (found, running)
        assert passes.waiting_prompt is (started if prefill else None)


@pytest.mark.parametrize("answer", [True, False])
def test_sglang_counts_its_steps_also_when_nobody_waits(answer: bool) -> None:
    asked: list[Any] = []

    def original(scheduler: Any, running_batch: Any) -> bool:
        asked.append(running_batch)
        return answer

    for running, waits in ((batch(LONG), True), (batch(req(0, 1)), False)):
        deferred = scheduler__should_defer_prefill.hook(original, None, None, running)
        assert deferred == (answer and waits)
        assert asked.pop() is running
