"""Pages for the last queries of a request: who has them, from when, and until when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_kvc.config.options import SWITCH, KVCompressOptions
from sglang_kvc.kernels.query_ring import ring_in
from sglang_kvc.kernels.testing import make_case
from sglang_kvc.memory.device_state import DeviceState
from sglang_kvc.requests.request_options import parse_request_options
from sglang_kvc.scheduling.attached import take_plan
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.course import Course, Way, course, reach
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.step_plan import StepPlan
from tests.unit.lonely_request import Case, Server

POOL, RING, SLOT = 1280, 32, 1
OPTIONS = KVCompressOptions(rate=4, min_budget=48)


@pytest.fixture
def server() -> Server:
    case = Case(
        POOL, 8192, 512, "auto", True, True, 32, 64, 48, 4, 300, 32, 0, ring=RING
    )
    return Server(case)


def make_policy(**request: object) -> RequestPolicy:
    """Of a request in a pool of which a ring takes its part."""
    rule = ChunkRule(mode="never", pool_tokens=POOL - RING, chunk_size=0, window=32)
    asked = parse_request_options({SWITCH: request}, OPTIONS)
    return RequestPolicy(OPTIONS, asked, rule, RING)


def make_batch(server: Server, state: RequestState, length: int) -> Any:
    """A decode step of one request."""
    req = SimpleNamespace(kv=state.kv, kv_compress_state=state)
    return SimpleNamespace(
        reqs=[req],
        seq_lens_cpu=torch.tensor([length]),
        req_pool_indices_cpu=torch.tensor([SLOT]),
        token_to_kv_pool_allocator=server.allocator,
        tree_cache=server.tree,
    )


def make_state(policy: RequestPolicy) -> RequestState:
    return RequestState(policy=policy, kv=object(), slot=SLOT, wants_ring=True)


@pytest.mark.parametrize("cached", [0, POOL])
def test_it_is_taken_from_the_pool_and_given_back(server: Server, cached: int) -> None:
    """Also from a pool that is full of cached prefixes."""
    server.cache(cached)
    state, plan = make_state(make_policy()), StepPlan()
    passes = server.runtime.pass_scheduler
    rings = passes.rings
    before = server.allocator.available_size() + server.tree.evictable_size()
    assert passes._take_ring(make_batch(server, state, 300), state, 7, plan)
    left = server.allocator.available_size() + server.tree.evictable_size()
    assert before - left == rings.held == state.ring_tokens == RING
    assert plan.rings == {SLOT: state.ring}
    assert state.observed == 7
    for _ in range(2):
        state.release_ring(server.allocator)
        assert server.allocator.available_size() + server.tree.evictable_size() == POOL
        assert rings.held == state.ring_tokens == 0


def test_without_room_for_it_passes_wait_and_then_see_new_queries_only(
    server: Server,
) -> None:
    passes = server.runtime.pass_scheduler
    state = make_state(make_policy())
    held = server.allocator.alloc(POOL)
    passes.due_lens[SLOT] = 300

    def plan(length: int) -> StepPlan:
        batch = make_batch(server, state, length)
        passes.plan_decode(batch)
        found = take_plan(batch)
        assert found is not None
        return found

    nothing = plan(300)
    assert not nothing.rings and not nothing.passes
    assert state.deferred_passes == 1
    server.allocator.free_segment(held[: POOL - 320], start_pos=0)
    first = plan(301)
    assert first.rings == {SLOT: state.ring} and not first.passes
    assert passes.due_lens[SLOT] == 301 + OPTIONS.window
    second = plan(301 + OPTIONS.window)
    (launched,) = second.passes
    assert not second.rings
    # Before position 300 the ring knew nothing.
    assert launched.decision.query_start == 301


def test_what_reaches_no_pass_has_none_and_the_whole_pool() -> None:
    policy = make_policy(budget=256)
    short, long = (course(policy, 100, left, 4096) for left in (219, 220))
    assert short == Course(Way.LATER, 319)
    assert long is not None and (long.way, long.ring) == (Way.LATER, RING)
    state = RequestState(policy=policy, kv=None, slot=SLOT)
    assert state.next_due(100) is None
    assert state.propose_while_decoding(320) is None
    state.wants_ring = True
    assert state.next_due(100) == 320
    assert state.propose_while_decoding(320) is not None
    off = make_policy(enabled=False)
    assert course(off, POOL - 17, 0, 0) == Course(Way.KEEP, POOL - 17)
    assert course(off, POOL - 16, 0, 0) is None
    assert reach(off, 160, 4096) == POOL - 17


@pytest.mark.parametrize("length", [800, 960])
def test_it_must_fit_beside_what_the_request_holds(length: int) -> None:
    """The prompt, the packed copy, a page and what is strictly less."""
    policy = make_policy(budget=256)
    way = course(policy, length, 0, 0)
    assert way is not None
    fits = length + 256 + 16 + 16 < POOL - RING
    assert (way.way, way.ring) == ((Way.AFTER, RING) if fits else (Way.KEEP, 0))


def test_the_table_follows_its_owners() -> None:
    case = make_case([40, 30, 20], layers=2, group=2, head_dim=64)
    pages = torch.zeros(5, 2, dtype=torch.int32)
    state = DeviceState(
        options=OPTIONS,
        shape=None,  # type: ignore[arg-type]
        arena=case.arena,
        tables=case.tables,
        query_ring=ring_in(case.arena, pages, 32),
        novelty_unit=torch.zeros(5),
        device="cpu",
    )
    assert state.ring_tokens == 32
    tokens = [torch.arange(16) + 16 * page for page in (7, 3, 9, 4)]
    state.set_rings({2: torch.cat(tokens[:2]), 4: torch.cat(tokens[2:])})
    assert pages.tolist() == [[0, 0], [0, 0], [7, 3], [0, 0], [9, 4]]
    state.reset_slots([2, 3])
    state.set_rings({3: torch.cat(tokens[:2])})
    assert pages.tolist() == [[0, 0], [0, 0], [0, 0], [7, 3], [9, 4]]
