"""Which prompts are compressed between chunks, and what the host allows for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_kvc.attention.prefill_packed import table_width
from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.requests.request_options import parse_request_options
from sglang_kvc.scheduling.acceptance import attach_policy, course_of
from sglang_kvc.scheduling.admission import _has_lists_for_one_more
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.course import Way, course, reach
from sglang_kvc.scheduling.passes import (
    MAX_DELAY_STEPS,
    PASS_TOKENS_PER_STEP,
    PassScheduler,
)
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.prompt_need import PromptNeed
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.step_plan import Fold
from tests.doubles import request_fields

POOL = 20_480
OPTIONS = KVCompressOptions(rate=8, min_budget=128)


def make_rule(mode: str = "auto", pool: int = POOL, chunk: int = 8192) -> ChunkRule:
    return ChunkRule(mode=mode, pool_tokens=pool, chunk_size=chunk, window=32)


def make_policy(rule: ChunkRule | None = None, **request: Any) -> RequestPolicy:
    return RequestPolicy(
        OPTIONS, parse_request_options({SWITCH: request}, OPTIONS), rule or make_rule()
    )


def way_of(policy: RequestPolicy, length: int) -> Way | None:
    found = course(policy, length, 500, 4096)
    return found.way if found is not None else None


def chunk_of(policy: RequestPolicy, length: int) -> int:
    found = course(policy, length, 500, 4096)
    return found.chunk if found is not None else 0


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
    assert chunk_of(make_policy(make_rule(mode)), prompt) == expected


def test_two_copies_and_a_chunk_must_fit() -> None:
    way = course(make_policy(), 60_000, 500, 4096)
    assert way is not None and way.step == 2 * 7504 + 2560 + 64
    assert course(make_policy(rate=4), 60_000, 500, 4096) is None  # 2 copies of 15,008
    # What two copies leave is a shorter chunk, down to a few windows. SGLang keeps a
    # page and a token free beside it.
    most = 20_480 - 19_200 - 64 - 17
    assert chunk_of(make_policy(budget=9_600), 60_000) == most // 16 * 16
    assert course(make_policy(budget=10_160), 60_000, 500, 4096) is None


def test_a_server_without_chunked_prefill_never_does() -> None:
    assert course(make_policy(make_rule("auto", chunk=0)), 60_000, 500, 4096) is None
    assert course(make_policy(enabled=False), 60_000, 500, 4096) is None
    assert course(make_policy(rate=1), 60_000, 500, 4096) is None


def request(length: int, hit: int, policy: RequestPolicy) -> Any:
    return SimpleNamespace(
        origin_input_ids=range(length),
        output_ids=(),
        full_untruncated_fill_ids=range(length),
        **request_fields(prefix=hit, held=hit),
        sampling_params=SimpleNamespace(max_new_tokens=500),
        kv_compress_policy=policy,
    )


@pytest.mark.parametrize("hit", [0, 1_024, 9_600])
def test_admission_is_charged_the_peak_and_not_the_prompt(hit: int) -> None:
    """A cached prefix is locked, hence charged by SGLang, until the first pass."""
    policy = make_policy()
    req = request(60_000, hit, policy)
    way = course_of(req)
    assert way is not None
    assert way.max_hit == 20_480 - 7504 - 2560 - 64 - 32
    need = PromptNeed.of(req)
    assert need is not None
    charged = need.missing + need.clip
    assert charged + hit == max(hit, 7504) + 7504 + 2560 + 64


def test_output_may_grow_until_two_copies_fill_the_pool() -> None:
    """And then by what one copy leaves: from there on nothing is evicted."""
    policy = make_policy()
    last = policy.last_pass
    assert last > 3 * POOL
    assert 2 * policy.budget(last) + policy.growth(policy.budget(last)) + 64 < POOL
    after = policy.budget(last + 1)
    assert 2 * after + policy.growth(after) + 64 >= POOL
    assert last < reach(policy, 6_000, 4096) <= last + POOL
    # A budget has no end; one that no copy fits beside is SGLang's own limit.
    assert reach(make_policy(budget=1_024), 6_000, 4096) > 1 << 60
    assert reach(make_policy(budget=POOL), 6_000, 4096) == 6_000 + POOL - 6_000 - 17


def test_a_prompt_that_fits_only_without_a_copy_is_kept_whole() -> None:
    assert way_of(make_policy(), 10_000) is Way.AFTER
    assert way_of(make_policy(rate=1.2), 19_000) is Way.KEEP
    assert way_of(make_policy(enabled=False), 100) is Way.KEEP
    assert way_of(make_policy(), 100) is Way.LATER
    assert way_of(make_policy(), 60_000) is Way.BETWEEN


def running(count: int, budget: int, scheduler: PassScheduler) -> list[Any]:
    """Requests that fell due at length 1,064 with `budget` packed tokens each."""
    reqs = []
    for slot in range(1, count + 1):
        kv = object()
        state = RequestState(policy=make_policy(), kv=kv, slot=slot)
        state.fold, state.packed = 1_000, budget
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
        cost = sum(state.packed + 64 + steps for state in
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


def test_copies_of_a_step_push_out_no_snapshots() -> None:
    """However late they are; but one request always gets its pass."""
    scheduler = PassScheduler(OPTIONS, 9)
    reqs, rows = running(8, 960, scheduler), np.arange(8)
    late = np.full(8, 1_064 + MAX_DELAY_STEPS)
    each = 960 + 64 + MAX_DELAY_STEPS
    assert len(scheduler._affordable(reqs, late, rows)) == 8
    for room, count in ((8 * each, 8), (3 * each + 50, 3), (each, 1), (-each, 1)):
        assert len(scheduler._affordable(reqs, late, rows, room)) == count


def test_a_request_with_embeddings_is_never_compressed_between_chunks() -> None:
    """The end of its prompt would score the chunks by placeholder ids."""
    runtime = SimpleNamespace(
        options=OPTIONS,
        chunk_rule=make_rule("always"),
        pass_scheduler=PassScheduler(OPTIONS, 1),
    )
    ways = []
    for embeds, overrides in ((None, None), ([[0.0]], None), (None, object())):
        req = SimpleNamespace(
            sampling_params=SimpleNamespace(custom_params=None),
            origin_input_ids=[1] * 15_000,
            input_embeds=embeds,
            positional_embed_overrides=overrides,
        )
        attach_policy(req, runtime)  # type: ignore[arg-type]
        ways.append(way_of(req.kv_compress_policy, 15_000))
        assert (way_of(req.kv_compress_policy, 60_000) is None) == (len(ways) > 1)
    assert ways == [Way.BETWEEN, Way.AFTER, Way.AFTER]


@pytest.mark.parametrize(
    ("context", "others"), [(8_192, 0), (65_536, 7), (131_072, 15)]
)
def test_page_lists_of_a_folded_step_stay_within_what_is_set_aside(
    context: int, others: int
) -> None:
    """[L, B, H, width] for all B requests; `metadata_bytes` counts one longest."""
    server: Any = SimpleNamespace(page_list_width=context // 16)
    folded = request(8_192, 0, make_policy())
    folded.kv_compress_state = RequestState(make_policy(), folded.kv, 1, fold=4_096)
    adder = SimpleNamespace(can_run_list=[folded])
    other = request(100, 0, make_policy())
    while _has_lists_for_one_more(adder, server, other):
        adder.can_run_list.append(other)
    assert len(adder.can_run_list) == 1 + others
    width = table_width([8_192], [Fold(4_096, 1_024)], 256)
    assert len(adder.can_run_list) * width <= context // 16
    # Without a folded prompt there are no lists.
    adder.can_run_list = adder.can_run_list[1:] or [other]
    assert _has_lists_for_one_more(adder, server, other)
