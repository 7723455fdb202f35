"""A first pass that waits for tokens of the answer, and what does not wait."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.requests.request_options import RequestOptions, parse_request_options
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.course import Way, course, delayed, reach
from sglang_kvc.scheduling.lengths import LATE_PASS_SLACK, UNLIMITED
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState

OPTIONS = KVCompressOptions(rate=4, min_budget=64)
PROMPT, DELAY, LEFT, HORIZON = 1003, 32, 500, 4096
POOL = 16_384


def make_policy(
    pool: int = POOL, mode: str = "auto", prompt: int = PROMPT, **asked: Any
) -> RequestPolicy:
    """Of a request as it arrives: without a delay, whatever it asks for."""
    request = parse_request_options({SWITCH: {"delay": DELAY, **asked}}, OPTIONS)
    rule = ChunkRule(mode=mode, pool_tokens=pool, chunk_size=512, window=32)
    return RequestPolicy(OPTIONS, request, rule, prompt_len=prompt)


def decided(policy: RequestPolicy, left: int = LEFT) -> int:
    """The delay that a request gets."""
    return delayed(policy, policy.prompt_len, left, HORIZON).delay


def test_nothing_is_evicted_before() -> None:
    plain = make_policy()
    policy = delayed(plain, PROMPT, LEFT, HORIZON)
    for length in range(1, PROMPT + DELAY):
        assert policy.budget(length) == UNLIMITED
        assert not policy.compresses(length)
        assert policy.compressed(length) == plain.budget(length)
    for length in range(PROMPT + DELAY, 3000):
        assert policy.budget(length) == plain.budget(length)
    assert plain.compresses(PROMPT)


@pytest.mark.parametrize("delay", [1, 16, 32, 100])
def test_the_first_pass_comes_with_the_last_token_it_waits_for(delay: int) -> None:
    policy = delayed(make_policy(delay=delay), PROMPT, LEFT, HORIZON)
    state = RequestState(policy=policy, kv=None, slot=1)
    assert state.propose_after_chunk(PROMPT, PROMPT) is None
    assert state.next_due(PROMPT) == PROMPT + delay
    for length in range(PROMPT + 1, PROMPT + delay):
        assert state.propose_while_decoding(length) is None
        assert state.next_due(length) == PROMPT + delay
    decision = state.propose_while_decoding(PROMPT + delay)
    assert decision is not None and decision.is_first and decision.pool_tail
    assert decision.seq_len == PROMPT + delay
    assert decision.query_start == PROMPT + delay - OPTIONS.window
    state.launch(decision, None, None)
    plain = make_policy()
    due = state.next_due(PROMPT + delay)
    assert due == decision.fold_new + plain.growth(decision.packed_new)


def test_a_server_sets_it_and_a_request_overrides_it() -> None:
    options = dataclasses.replace(OPTIONS, delay=48)
    rule = make_policy().chunk_rule
    for asked, expected in ((None, 48), (0, 0), (16, 16)):
        request = RequestOptions(delay=asked)
        policy = RequestPolicy(options, request, rule, prompt_len=PROMPT)
        assert policy.delay == 0
        assert decided(policy) == expected
    off = RequestPolicy(options, RequestOptions(enabled=False), rule, prompt_len=PROMPT)
    assert off.asked_delay == decided(off) == 0


def test_what_is_never_compressed_does_not_wait() -> None:
    assert decided(make_policy(rate=1)) == 0
    assert decided(make_policy(budget=1 << 20)) == 0


@pytest.mark.parametrize(
    ("left", "expected"), [(0, 0), (DELAY, 0), (DELAY + 1, DELAY), (1 << 30, DELAY)]
)
def test_an_answer_that_may_end_before_does_not_wait(left: int, expected: int) -> None:
    """Its last token is in no step, so one more than the delay is needed."""
    assert decided(make_policy(budget=256), left) == expected


@pytest.mark.parametrize("left", [DELAY + 1, LEFT])
def test_what_does_not_fit_whole_does_not_wait(left: int) -> None:
    """At every size of the pool: exactly what its prompt, delay and copy ask for.

    Not even if it could keep everything to the end of a short answer.
    """
    budget, seen = make_policy().budget(PROMPT + DELAY), set()
    whole = PROMPT + DELAY + budget + LATE_PASS_SLACK + 16
    for pool in range(640, 3 * PROMPT, 16):
        policy = make_policy(pool, mode="never")
        way = course(policy, PROMPT, left, HORIZON)
        if way is None or way.way is not Way.AFTER:
            assert decided(policy, left) == 0
            continue
        fits = whole + 16 < pool
        seen.add(fits)
        assert decided(policy, left) == (DELAY if fits else 0), pool
    assert seen == {True, False}


def test_what_is_compressed_between_chunks_does_not_wait() -> None:
    for mode, pool, expected in (
        ("auto", 2 * PROMPT - 64, 0),
        ("auto", 2 * PROMPT + 64, DELAY),
        ("always", POOL, 0),
        ("never", 2 * PROMPT - 64, DELAY),
    ):
        assert decided(make_policy(pool, mode)) == expected, (mode, pool)


@pytest.mark.parametrize("rate", [1.1, 1.5, 2, 4])
def test_an_answer_may_grow_as_long_as_without(rate: float) -> None:
    for pool in range(1200, 4800, 48):
        plain = make_policy(pool, mode="never", rate=rate)
        if course(plain, PROMPT, 0, 0) is None:
            continue
        left = min(reach(plain, PROMPT, HORIZON) - PROMPT, 1 << 30)
        policy = delayed(plain, PROMPT, left, HORIZON)
        assert reach(policy, PROMPT, HORIZON) >= PROMPT + left


def test_what_was_retracted_waits_for_the_rest_only() -> None:
    policy = delayed(make_policy(), PROMPT, LEFT, HORIZON)
    for done in range(DELAY):
        way = course(policy, PROMPT + done, LEFT - done, HORIZON)
        assert way is not None and way.way is Way.LATER
        assert policy.first_due(PROMPT + done) == PROMPT + DELAY
    way = course(policy, PROMPT + DELAY, LEFT - DELAY, HORIZON)
    assert way is not None and way.way is Way.AFTER


def test_what_starts_from_a_snapshot_does_not_wait() -> None:
    policy = delayed(make_policy(), PROMPT, LEFT, HORIZON)
    resumed = dataclasses.replace(policy, least_budget=256)
    assert not resumed.waits(PROMPT)
    assert resumed.budget(PROMPT) == 256
    # It waits in the queue again: what it was is not forgotten.
    again = dataclasses.replace(resumed, least_budget=0)
    assert again == policy


def test_the_end_of_passes_is_found_whatever_the_delay() -> None:
    """It is searched for by halving: a delay must not look like a full pool."""
    for prompt in (100, 1000, 3000, 6000):
        plain = make_policy(prompt=prompt, rate=1.5)
        late = dataclasses.replace(plain, delay=4096)
        assert late.last_pass == plain.last_pass < UNLIMITED


def test_the_summary_tells_a_budget_while_it_waits() -> None:
    policy = delayed(make_policy(), PROMPT, LEFT, HORIZON)
    told = RequestState(policy=policy, kv=None, slot=1).summary(PROMPT + 3)
    assert told["budget_tokens"] == policy.compressed(PROMPT + 3) == 256
    assert told["resident_tokens"] == PROMPT + 3 and told["passes"] == 0
