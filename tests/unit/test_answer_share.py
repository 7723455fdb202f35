"""The share of an answer: whole up to a bound, beside the budget of the prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.eviction.runner import _plan_request
from sglang_kvc.requests.request_options import RequestOptions, parse_request_options
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.headroom import growth_bound
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState
from tests.doubles import request_fields

OPTIONS = KVCompressOptions(rate=4, min_budget=64, window=32, interval=64)
PROMPT, ANSWER = 1003, 200
START, WHOLE = 992, 208
"""Where the pass behind the prompt folds, and the answer in whole pages."""


def make_policy(**request: object) -> RequestPolicy:
    asked = parse_request_options({SWITCH: {"answer": ANSWER, **request}}, OPTIONS)
    rule = ChunkRule(mode="never", pool_tokens=16_384, chunk_size=0, window=32)
    return RequestPolicy(OPTIONS, asked, rule, prompt_len=PROMPT)


def started(**request: object) -> RequestState:
    """A request behind its prompt, which has been compressed."""
    state = RequestState(policy=make_policy(**request), kv=None, slot=3)
    decision = state.propose_after_chunk(PROMPT, PROMPT)
    assert decision is not None
    state.launch(decision, None, None)
    state.prefilled = PROMPT
    return state


@pytest.mark.parametrize("request_options", [{}, {"budget": 256}, {"rate": 2}])
def test_prompt_and_answer_have_budgets_of_their_own(
    request_options: dict[str, Any],
) -> None:
    """At every length: written out, not as the code has it."""
    policy = make_policy(**request_options)
    rate = request_options.get("rate", 4)
    for length in range(1, 3000):
        pages = min(max(length // 16 - START // 16, 0), WHOLE // 16)
        others = length if length < PROMPT else max(PROMPT, length - WHOLE)
        prompt = 256 if "budget" in request_options else max(-(-others // rate), 64)
        assert policy.budget(length) == -(-prompt // 16) * 16 + 16 * pages


def test_a_server_sets_it_and_a_request_overrides_it() -> None:
    options = KVCompressOptions(answer=100)
    policy = RequestPolicy(options, RequestOptions(), prompt_len=5000)
    assert policy.answer == 112
    assert (
        policy.budget(6000)
        == RequestPolicy(options, RequestOptions()).budget(6000 - 112) + 112
    )
    none = RequestPolicy(options, RequestOptions(answer=0), prompt_len=5000)
    assert none.budget(6000) == 1504
    assert none.protected(6000) == options.protected


def test_no_pass_and_no_look_while_the_answer_is_whole() -> None:
    state = started(budget=256)
    for length in range(PROMPT, START + WHOLE + 16):
        assert state.propose_while_decoding(length) is None
    due = state.next_due(PROMPT)
    assert due == START + WHOLE + OPTIONS.interval
    assert state.next_due(due - 1) == due
    decision = state.propose_while_decoding(due)
    assert decision is not None and decision.gain - decision.packed_new == 64
    assert decision.protected == WHOLE


@pytest.mark.parametrize("request_options", [{}, {"budget": 128}, {"rate": 1.5}])
def test_resident_stays_below_budget_interval_and_two_pages(
    request_options: dict[str, Any],
) -> None:
    state = started(**request_options)
    policy, due = state.policy, state.next_due(PROMPT)
    for length in range(PROMPT + 1, 3000):
        if due is not None and length >= due:
            decision = state.propose_while_decoding(length)
            if decision is not None:
                request = _plan_request(decision, OPTIONS)
                forced = OPTIONS.sinks + request.protected
                assert forced <= decision.packed_new
                assert request.evict_pages <= request.evict_most_pages
                state.launch(decision, None, None)
            due = state.next_due(length)
        most = policy.budget(length) + policy.growth(policy.budget(length)) + 32
        assert state.resident(length) <= most
    assert state.passes > 5


def test_a_layer_can_keep_what_its_heads_must() -> None:
    """A retracted request: one pass over the prompt and 150 tokens of its answer."""
    state = RequestState(policy=make_policy(), kv=None, slot=3)
    decision = state.propose_after_chunk(PROMPT + 150, PROMPT + 150)
    assert decision is not None
    request = _plan_request(decision, OPTIONS)
    assert request.protected == 1152 - PROMPT
    held = request.fold_blocks - request.evict_most_pages
    assert 16 * held >= OPTIONS.sinks + request.protected


def test_short_prompts_are_left_alone_until_their_answer_outgrows_it() -> None:
    policy = make_policy(budget=1024)
    state = RequestState(policy=policy, kv=None, slot=3)
    assert state.propose_after_chunk(PROMPT, PROMPT) is None
    due = state.next_due(PROMPT)
    assert due is not None and due >= 1024 + WHOLE + OPTIONS.interval
    assert state.propose_while_decoding(due) is not None


def test_admission_charges_a_whole_answer_by_sglangs_guess() -> None:
    """Not for all of it: most answers end before."""
    state = started(budget=256)
    fields = request_fields(committed=PROMPT + 8, held=PROMPT + 8)
    state.kv = fields["kv"]
    req: Any = SimpleNamespace(
        **fields,
        kv_compress_state=state,
        kv_compress_policy=state.policy,
        sampling_params=SimpleNamespace(max_new_tokens=5000),
        output_ids=range(8),
    )
    assert growth_bound(req, 40.0) == 48 + OPTIONS.interval + 32
    req.sampling_params.max_new_tokens = 30
    assert growth_bound(req, 40.0) == 32


@pytest.mark.parametrize("answer", [0, ANSWER])
def test_mean_of_resident_tokens_is_that_of_every_step(answer: int) -> None:
    state = started(answer=answer, budget=128)
    assert state.summary(PROMPT)["mean_resident_tokens"] == state.resident(PROMPT)
    due, held = state.next_due(PROMPT), []
    for length in range(PROMPT + 1, 1700):
        held.append(state.resident(length))
        if length == due:
            decision = state.propose_while_decoding(length)
            assert decision is not None
            state.launch(decision, None, None)
            due = state.next_due(length)
        told = state.summary(length)["mean_resident_tokens"]
        assert told == round(sum(held) / len(held))
    assert state.passes > 5
