"""Admission counts what is held now and what is held later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.requests.request_options import RequestOptions, parse_request_options
from sglang_kvc.scheduling.acceptance import course_of
from sglang_kvc.scheduling.admission import add_one, preempt
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.headroom import Headroom, growth_bound, running_charge
from sglang_kvc.scheduling.lengths import NEVER_DUE
from sglang_kvc.scheduling.pass_decision import PassDecision, Phase
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import PassInFlight, RequestState
from sglang_kvc.scheduling.turns import Turns
from sglang_kvc.upstream.generation import UPSTREAM
from tests.doubles import ChargedAdder, request_fields

OPTIONS = KVCompressOptions(rate=8, min_budget=128)
POOL = 20_480
PROMPT, MAX_NEW = 6_000, 500
BUDGET = 752
RULE = ChunkRule(mode="never", pool_tokens=POOL, chunk_size=0, window=32)


class Adder(ChargedAdder):
    """The parts of SGLang's PrefillAdder that admission touches."""

    def __init__(self, running: list[Any], used: int, chunk: int = 8_192) -> None:
        self.running_batch = SimpleNamespace(reqs=running)
        self.due_lens = np.full(257, NEVER_DUE, dtype=np.int64)
        self.passes = SimpleNamespace(due_lens=self.due_lens, preempted=[], stuck=None)
        self.server: Any = SimpleNamespace(pass_scheduler=self.passes, turns=Turns())
        self.log_input_tokens = 0
        self.token_to_kv_pool_allocator = SimpleNamespace(size=POOL)
        self.available = POOL - used
        self.rem_chunk_tokens = chunk
        self.can_run_list: list[Any] = []
        self.preempt_list: list[Any] = []
        self.tree_cache = None
        super().__init__(sum(growth_bound(req, MAX_NEW) for req in running))

    @property
    def rem_total_tokens(self) -> float:
        return self.available - self.charged

    def add(self, req: Any) -> Any:
        """SGLang's rule: the prompt and the clipped new tokens must remain."""
        from sglang.srt.managers import schedule_policy

        clip = min(
            req.sampling_params.max_new_tokens, schedule_policy.CLIP_MAX_NEW_TOKENS
        )
        total = len(req.full_untruncated_fill_ids) + clip + 16
        if total >= self.rem_total_tokens:
            return AddReqResult.NO_TOKEN
        self.can_run_list.append(req)
        self.charged += total
        return AddReqResult.CONTINUE

    def try_add(self, req: Any) -> bool:
        add_one(self, self.server, req, lambda: self.add(req))
        return any(admitted is req for admitted in self.can_run_list)


def candidate(length: int = PROMPT, **request: Any) -> Any:
    params = SimpleNamespace(max_new_tokens=MAX_NEW, ignore_eos=True)
    return SimpleNamespace(
        origin_input_ids=range(length),
        full_untruncated_fill_ids=range(length),
        **request_fields(),
        init_next_round_input=lambda tree: None,
        output_ids=(),
        sampling_params=params,
        kv_compress_policy=RequestPolicy(
            OPTIONS, parse_request_options({SWITCH: request}, OPTIONS), RULE
        ),
    )


def running(slot: int, tail: int, fold: int = PROMPT) -> Any:
    """A compressed request with `tail` tokens since its last pass."""
    fields = request_fields(committed=fold + tail, held=fold + tail)
    policy = RequestPolicy(OPTIONS, RequestOptions(), RULE)
    state = RequestState(policy=policy, kv=fields["kv"], slot=slot)
    state.fold, state.packed = fold, policy.budget(fold)
    return SimpleNamespace(
        **fields,
        kv_compress_state=state,
        kv_compress_policy=policy,
        sampling_params=SimpleNamespace(max_new_tokens=MAX_NEW),
        output_ids=range(tail),
    )


def held(reqs: list[Any]) -> int:
    lens = [UPSTREAM.committed_len(r) - r.kv_compress_state.fold for r in reqs]
    return sum(BUDGET + -(-tail // 16) * 16 for tail in lens)


def test_a_prompt_needs_no_room_for_the_growth_of_others() -> None:
    """17 running requests leave room for one more prompt, though not for all growth."""
    reqs = [running(slot, tail=4) for slot in range(1, 18)]
    adder = Adder(reqs, held(reqs))
    growth = adder.charged
    assert PROMPT + BUDGET + growth > adder.available
    assert adder.try_add(candidate())
    # The next one counts on top of both sums.
    assert not adder.try_add(candidate())
    headroom = Headroom.of(adder)
    way = course_of(candidate())
    assert way is not None
    assert headroom.steady == growth + way.later
    # The budget of the whole answer, an interval, two pages.
    assert way.later == 816 + 64 + 32
    assert headroom.now == PROMPT + BUDGET + 2 * 16
    assert adder.charged == max(headroom.now, headroom.steady)


def test_what_all_can_grow_to_must_fit() -> None:
    """One page of budget each: the prompt fits now, but growth would not."""
    reqs = [running(slot, tail=0) for slot in range(1, 18)]
    adder = Adder(reqs, used=0)
    adder.charged = POOL - 2 * BUDGET
    assert not adder.try_add(candidate())


def test_tails_are_squeezed_when_that_lets_a_prompt_in() -> None:
    reqs = [running(slot, tail=40 + slot) for slot in range(1, 18)]
    adder = Adder(reqs, held(reqs))
    assert not adder.try_add(candidate())
    due = np.flatnonzero(adder.due_lens < NEVER_DUE)
    missing = PROMPT + BUDGET + 33 - adder.available
    gains = {
        r.kv_compress_state.slot: r.kv_compress_state.gain(UPSTREAM.committed_len(r))
        for r in reqs
    }
    # Enough, the longest tails first, and not one more than needed.
    assert sum(gains[slot] for slot in due) >= missing
    assert sum(gains[slot] for slot in due[1:]) < missing
    assert min(gains[s] for s in due) >= max(
        (gain for s, gain in gains.items() if s not in due), default=0
    )
    # They are due already: asking again adds none.
    assert not adder.try_add(candidate())
    assert np.flatnonzero(adder.due_lens < NEVER_DUE).tolist() == due.tolist()


def test_no_squeeze_where_it_would_not_help() -> None:
    reqs = [running(slot, tail=40) for slot in range(1, 20)]
    adder = Adder(reqs, held(reqs))
    assert not adder.try_add(candidate())
    assert (adder.due_lens == NEVER_DUE).all()


def test_passes_in_flight_count_before_any_other() -> None:
    reqs = [running(slot, tail=56) for slot in range(1, 18)]
    for req in reqs[:16]:
        state = req.kv_compress_state
        decision = PassDecision(
            phase=Phase.DECODE,
            slot=state.slot,
            seq_len=PROMPT + 56,
            fold_old=PROMPT,
            fold_new=PROMPT + 48,
            packed_old=BUDGET,
            packed_new=BUDGET,
            query_start=0,
            protected=32,
            repeated=False,
        )
        state.in_flight.append(PassInFlight(decision, req, state, None))
    adder = Adder(reqs, held(reqs))
    assert not adder.try_add(candidate())
    assert (adder.due_lens == NEVER_DUE).all()


@pytest.mark.parametrize("request_options", [{"enabled": False}, {"rate": 1}])
def test_other_requests_keep_the_stock_charge(request_options: dict[str, Any]) -> None:
    reqs = [running(slot, tail=4) for slot in range(1, 18)]
    growth = sum(growth_bound(req, MAX_NEW) for req in reqs)
    charge = 100 + MAX_NEW + 16
    for spare in (0, 1):
        adder = Adder(reqs, used=POOL - int(growth) - charge - spare)
        assert adder.try_add(candidate(length=100, **request_options)) == bool(spare)


def test_what_sglang_charges_itself_counts_in_both_sums() -> None:
    reqs = [running(1, tail=4)]
    adder = Adder(reqs, held(reqs))
    before = Headroom.of(adder)
    now, steady = before.now, before.steady
    adder.charged += 1_000
    after = Headroom.of(adder)
    assert (after.now, after.steady) == (now + 1_000, steady + 1_000)


def test_a_request_without_a_limit_is_not_charged_for_the_whole_context() -> None:
    req = running(1, tail=10)
    tail = OPTIONS.interval + 32 - 10
    assert growth_bound(req, 80.0) <= tail + 16
    req.sampling_params.max_new_tokens = 100_000
    assert growth_bound(req, 400.0) <= tail + 64
    # However small the guess, the interval is charged, unless the request ends sooner.
    assert growth_bound(req, 1.0) >= tail
    req.sampling_params.max_new_tokens = len(req.output_ids) + 20
    assert growth_bound(req, 1.0) == 32


def uncompressed(slot: int, length: int, max_new: int) -> Any:
    """A running request that keeps everything."""
    policy = RequestPolicy(OPTIONS, RequestOptions(enabled=False), RULE)
    fields = request_fields(committed=length, held=length)
    return SimpleNamespace(
        **fields,
        kv_compress_state=RequestState(policy=policy, kv=fields["kv"], slot=slot),
        kv_compress_policy=policy,
        sampling_params=SimpleNamespace(max_new_tokens=max_new),
        output_ids=(),
    )


def test_the_growth_of_preempted_requests_is_taken_from_one_sum() -> None:
    """It was part of *steady*; *now* never held it, and must not give it away."""
    reqs = [uncompressed(slot, 1_000, MAX_NEW) for slot in (1, 2, 3)]
    adder = Adder(reqs, used=3_008)
    adder._get_running_request_total_token_offset = lambda req: running_charge(
        adder, req, MAX_NEW
    )
    headroom = Headroom.of(adder)
    now, steady = headroom.now, headroom.steady
    victim = reqs[0]

    def stock() -> bool:
        # SGLang: take the charge out of the sum, release the pages.
        charge = adder._get_running_request_total_token_offset(victim)
        assert charge == MAX_NEW + 1_008
        adder.charged -= charge
        adder.available += 1_008
        adder.preempt_list.append(victim)
        return True

    assert preempt(adder, adder.server, candidate(), stock)
    assert adder.passes.preempted == [victim]
    after = Headroom.of(adder)
    assert (after.now, after.steady) == (now, steady - MAX_NEW)
    assert after.free == POOL - 3_008 + 1_008


def test_an_empty_pool_without_room_ends_the_request_and_not_the_server() -> None:
    """It cannot happen, see test_course; if it did, nobody may wait for it."""
    adder = Adder([], used=0)
    req = candidate()
    add_one(adder, adder.server, req, lambda: AddReqResult.NO_TOKEN)
    assert adder.passes.stuck is req
    for adder in (Adder([], used=16), Adder([uncompressed(1, 60, 9)], used=0)):
        add_one(adder, adder.server, req, lambda: AddReqResult.NO_TOKEN)
        assert adder.passes.stuck is None
