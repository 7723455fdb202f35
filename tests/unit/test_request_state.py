"""Host-side life of a request: when a pass is due and what it must keep."""

from __future__ import annotations

import pytest

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.requests.request_options import RequestOptions, parse_request_options
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState

OPTIONS = KVCompressOptions(rate=4, min_budget=64, window=32, interval=64)


def make_state(**request: object) -> RequestState:
    policy = RequestPolicy(OPTIONS, parse_request_options({SWITCH: request}, OPTIONS))
    return RequestState(policy=policy, kv=None, slot=3)


def launch(state: RequestState, length: int, prompt: bool = False) -> None:
    if prompt:
        decision = state.propose_after_chunk(length, length)
    else:
        decision = state.propose_while_decoding(length)
    assert decision is not None
    state.launch(decision, None, "pages")


def test_first_pass_of_a_prompt() -> None:
    state = make_state()
    decision = state.propose_after_chunk(1003, 1003)
    assert decision is not None
    assert (decision.fold_old, decision.fold_new) == (0, 992)
    assert decision.packed_new == 256  # ceil16(1003 / 4)
    assert decision.query_start == 1003 - 32
    assert decision.is_first and decision.pool_tail and not decision.between_chunks


def test_nothing_to_free_is_no_pass() -> None:
    assert (
        make_state().propose_while_decoding(70) is None
    )  # below the floor of 64 + a page
    assert make_state(enabled=False).propose_while_decoding(5000) is None
    assert make_state(budget=2048).propose_while_decoding(2050) is None
    assert make_state(rate=1).propose_while_decoding(5000) is None


@pytest.mark.parametrize("interval", [1, 16, 50, 64])
def test_resident_stays_below_budget_plus_interval_plus_two_pages(
    interval: int,
) -> None:
    options = KVCompressOptions(budget=128, interval=interval)
    policy = RequestPolicy(options, RequestOptions())
    state = RequestState(policy=policy, kv=None, slot=1)
    launch(state, 777, prompt=True)
    due = state.next_due(777)
    for length in range(778, 1500):
        assert state.resident(length) <= 128 + interval + 32
        if length >= due:
            launch(state, length)
            due = state.next_due(length)
    assert state.peak_resident <= 128 + interval + 32


def test_queries_are_observed_once() -> None:
    state = make_state(budget=128)
    launch(state, 500, prompt=True)
    decision = state.propose_while_decoding(520)
    assert decision is not None
    assert not decision.pool_tail
    assert decision.query_start == 500  # not 520 - 32: those were observed


def test_outgrown_budget_becomes_due_at_budget_plus_interval() -> None:
    state = make_state(budget=128)
    assert state.next_due(100) == 128 + 64
    assert make_state(enabled=False).next_due(100) is None
    assert make_state(rate=1).next_due(100) is None


def make_bounded(pool: int, **request: object) -> RequestState:
    rule = ChunkRule(mode="never", pool_tokens=pool, chunk_size=0, window=32)
    asked = parse_request_options({SWITCH: request}, OPTIONS)
    policy = RequestPolicy(OPTIONS, asked, rule)
    return RequestState(policy=policy, kv=None, slot=3)


def test_a_pass_that_no_pool_could_hold_is_never_due() -> None:
    """Rate 1.1 of 900 tokens in 1,280: 896 and a copy of 832 do not fit, ever."""
    state = make_bounded(1280, rate=1.1)
    assert state.propose_after_chunk(900, 900) is None
    assert state.next_due(900) is None
    assert make_bounded(2048, rate=1.1).propose_after_chunk(900, 900) is not None


@pytest.mark.parametrize("rate", [1.01, 1.02, 1.1, 2, 8])
def test_passes_copy_at_most_64_times_what_they_free(rate: float) -> None:
    """Over a prompt of 100,000 tokens and an output of 20,000, page by page."""
    state = make_state(rate=rate)
    length = due = 100_000
    while length < 120_000:
        if length >= due:
            decision = state.propose_while_decoding(length)
            if decision is not None:
                freed = decision.gain - decision.packed_new
                assert decision.packed_new <= 64 * freed
                state.launch(decision, None, None)
            due = state.next_due(length)
            assert due is None or due > length
        length = 120_000 if due is None else min(due, 120_000)
    # Nobody waits in vain either: what is held is a 64th above the budget, at most two.
    budget = state.policy.budget(length)
    assert state.resident(length) <= budget * (1 + 2 / 64) + OPTIONS.interval + 64


def test_a_late_look_is_not_repeated_at_every_token() -> None:
    """Rate 1.05: an interval of tokens frees three; the next look is where it pays."""
    state = make_state(rate=1.05)
    launch(state, 3_000, prompt=True)
    looks = 0
    length = 3_000
    while length < 5_000:
        length = state.next_due(length)
        looks += 1
        if state.propose_while_decoding(length) is not None:
            launch(state, length)
    assert looks < 100


def test_abandoned_passes_are_dead_and_settled_ones_are_not() -> None:
    state = make_state()
    launch(state, 500, prompt=True)
    (first,) = state.in_flight
    state.settle(first)
    launch(state, 600)
    (dead,) = state.abandon()
    assert dead.closed
    assert first.closed
    assert state.settled_packed == "pages"
    assert state.settled_fold == 496
    assert not state.in_flight


def test_summary_of_a_request_that_outgrew_its_budget() -> None:
    state = make_state(budget=64)
    launch(state, 128)
    summary = state.summary(130)
    assert summary["resident_tokens"] == 64 + 2
    assert summary["peak_resident_tokens"] == 128
    assert summary["passes"] == 1
