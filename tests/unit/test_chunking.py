"""Which prompts are compressed between chunks, and what the host allows for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_kvc.admission import fits_whole, longest_output, new_request_clip
from sglang_kvc.chunking import ChunkRule
from sglang_kvc.options import KVCompressOptions
from sglang_kvc.request_options import RequestOptions
from sglang_kvc.request_state import RequestPolicy, RequestState
from sglang_kvc.scheduling import MAX_DELAY_STEPS, PASS_TOKENS_PER_STEP, PassScheduler

POOL = 20_480
OPTIONS = KVCompressOptions(rate=8, min_budget=128)


def make_rule(mode: str = "auto", pool: int = POOL, chunk: int = 8192) -> ChunkRule:
    return ChunkRule(mode=mode, pool_tokens=pool, chunk_size=chunk, window=32)


def make_policy(rule: ChunkRule | None = None, **request: Any) -> RequestPolicy:
    return RequestPolicy(OPTIONS, RequestOptions(**request), rule or make_rule())


@pytest.mark.parametrize(
    ("mode", "prompt", "expected"),
    [
        ("auto", 10_239, 0),  # less than half the pool
        ("auto", 10_240, 2560),  # an eighth of the pool
        ("always", 6_000, 2560),
        ("always", 2_900, 0),  # one chunk and the budget hold all of it
        ("never", 60_000, 0),
    ],
)
def test_mode_and_length_decide(mode: str, prompt: int, expected: int) -> None:
    assert make_policy(make_rule(mode)).chunk_tokens(prompt) == expected


def test_two_copies_and_a_chunk_must_fit() -> None:
    assert make_policy().peak_tokens(60_000) == 2 * 7504 + 2560 + 64
    assert make_policy(rate=4).chunk_tokens(60_000) == 0  # two copies of 15,008
    # What two copies leave is a shorter chunk, down to a few windows.
    assert make_policy(budget=9_600).chunk_tokens(60_000) == 20_480 - 19_200 - 64
    assert make_policy(budget=10_160).chunk_tokens(60_000) == 0


def test_a_server_without_chunked_prefill_never_does() -> None:
    assert make_policy(make_rule("auto", chunk=0)).chunk_tokens(60_000) == 0
    assert make_policy(enabled=False).chunk_tokens(60_000) == 0
    assert make_policy(rate=1).chunk_tokens(60_000) == 0


def test_admission_is_charged_the_peak_and_not_the_prompt() -> None:
    policy = make_policy()
    req = SimpleNamespace(
        full_untruncated_fill_ids=range(60_000),
        prefix_indices=range(1_024),
        kv_compress_policy=policy,
    )
    charged = 60_000 - 1_024 + new_request_clip(req, 4096)
    assert charged == policy.peak_tokens(60_000)


def test_output_may_grow_until_two_copies_fill_the_pool() -> None:
    policy = make_policy()
    longest = longest_output(policy, 6_000, 1 << 20, POOL)
    assert 6_000 + longest > 3 * POOL
    assert 2 * policy.budget(6_000 + longest) + 64 + 64 < POOL
    assert 2 * policy.budget(6_000 + longest + 128) + 64 + 64 >= POOL
    assert longest_output(policy, 6_000, 500, POOL) == 500
    assert longest_output(make_policy(budget=POOL), 6_000, 500, POOL) == 0


def test_fits_whole_counts_the_packed_copy() -> None:
    assert fits_whole(make_policy(), 16_000, POOL)
    assert not fits_whole(make_policy(), 19_000, POOL)
    assert not fits_whole(make_policy(enabled=False), 100, POOL)


def running(count: int, budget: int, scheduler: PassScheduler) -> list[Any]:
    """Requests that fell due at length 1,064 with `budget` packed tokens each."""
    reqs = []
    for slot in range(1, count + 1):
        kv = object()
        state = RequestState(policy=make_policy(), kv=kv, slot=slot)
        state.fold, state.budget = 1_000, budget
        scheduler.due_lens[slot] = 1_064
        reqs.append(SimpleNamespace(kv=kv, kv_compress_state=state))
    return reqs


def test_passes_of_a_batch_are_spread_over_steps() -> None:
    scheduler = PassScheduler(OPTIONS, 65)
    reqs = running(64, 960, scheduler)
    rows, steps = list(range(64)), 0
    while rows:
        lens = np.full(64, 1_064 + steps)
        chosen = scheduler._affordable(reqs, lens, np.array(rows))
        cost = sum(state.budget + 64 + steps for state in
                   (reqs[row].kv_compress_state for row in chosen))  # fmt: skip
        assert chosen and cost <= PASS_TOKENS_PER_STEP
        rows = [row for row in rows if row not in chosen]
        steps += 1
    assert 64 * 1_024 / PASS_TOKENS_PER_STEP <= steps <= MAX_DELAY_STEPS + 1


def test_a_large_request_goes_alone_and_a_late_one_at_once() -> None:
    scheduler = PassScheduler(OPTIONS, 4)
    reqs = running(3, 2 * PASS_TOKENS_PER_STEP, scheduler)
    rows = np.arange(3)
    assert scheduler._affordable(reqs, np.full(3, 1_064), rows) == [0]
    late = np.full(3, 1_064 + MAX_DELAY_STEPS)
    assert scheduler._affordable(reqs, late, rows) == [0, 1, 2]
