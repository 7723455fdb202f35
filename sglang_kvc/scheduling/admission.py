"""Admission: ask a pool in use for what `course` has asked of an empty one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.config.pages import PAGE_SIZE, floor_tokens, pages_of
from sglang_kvc.scheduling.acceptance import course_of
from sglang_kvc.scheduling.attached import hit_of, policy_of, state_of
from sglang_kvc.scheduling.awaiting import Awaiting
from sglang_kvc.scheduling.charges import (
    all_tokens_asked,
    as_if_eos_counted,
    clip_of,
)
from sglang_kvc.scheduling.course import Way
from sglang_kvc.scheduling.cutting import in_chunk, in_turn, longest_chunk
from sglang_kvc.scheduling.expected import Expected
from sglang_kvc.scheduling.headroom import Headroom
from sglang_kvc.scheduling.lookup import find_hit
from sglang_kvc.scheduling.prompt_need import PromptNeed
from sglang_kvc.scheduling.resuming import is_admitted, starting_from
from sglang_kvc.scheduling.server import Server
from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.upstream.types import PrefillAdder, Req


def add_one(
    adder: PrefillAdder, server: Server, req: Req, call: Callable[[], Any]
) -> Any:
    """Run ``PrefillAdder.add_one_req`` with the charge and the chunk that fit `req`.

    If the request does not fit although nothing else runs, snapshots that others wait
    for are given up, and its own like any other prefix: what has a course is admitted.
    """
    headroom = Headroom.of(adder)
    if policy_of(req) is None or course_of(req) is None:
        return _beside_loans(adder, headroom, req, call)
    hit = find_hit(adder.tree_cache, req)
    from_hit = partial(_add_from, hit, adder, server, req, call)
    result = _beside_loans(adder, headroom, req, from_hit)
    if hit is not None and _is_refused_alone(adder, headroom, result):
        adder.tree_cache.awaiting.end(req)
        result = _add_from(None, adder, server, req, call)
    pool_tokens = adder.token_to_kv_pool_allocator.size
    alone = _is_refused_alone(adder, headroom, result)
    if alone and headroom.free == pool_tokens:
        # An empty pool has no room. It must not happen, see `course`; if it does, this
        # request ends, and the others do not wait for it. (One that has ended stays in
        # the running batch for a step, without memory, and is still charged.)
        server.pass_scheduler.stuck = req
    return result


def _beside_loans(
    adder: PrefillAdder, headroom: Headroom, req: Req, call: Callable[[], Any]
) -> Any:
    """Run `call`; if nothing runs and it finds no room, without loans to others."""
    result, awaiting = call(), _loans(adder)
    while (
        awaiting is not None
        and _is_refused_alone(adder, headroom, result)
        and awaiting.spare_one(req)
    ):
        result = call()
    return result


def _loans(adder: PrefillAdder) -> Awaiting | None:
    """What waiting requests have been lent; SGLang's own trees lend nothing."""
    return getattr(adder.tree_cache, "awaiting", None)


def _is_refused_alone(adder: PrefillAdder, headroom: Headroom, result: Any) -> bool:
    refused = result is schedule_policy.AddReqResult.NO_TOKEN
    return refused and not adder.can_run_list and not headroom.running


def _add_from(
    hit: Hit | None,
    adder: PrefillAdder,
    server: Server,
    req: Req,
    call: Callable[[], Any],
) -> Any:
    """Try to admit a request that starts from `hit`, or from its whole prefix."""
    with starting_from(hit, adder, req):
        headroom, need = Headroom.of(adder), PromptNeed.of(req)
        assert need is not None
        if not server.turns.takes(adder.log_input_tokens, need.missing):
            return schedule_policy.AddReqResult.OTHER
        expected = None
        if hit is None and not need.goes_on:
            expected = getattr(adder.tree_cache, "expected", None)
        if expected is not None and _leaves_room(adder, headroom, need, expected):
            return schedule_policy.AddReqResult.OTHER
        result = _add_one(adder, server, headroom, need, req, call)
        if expected is not None and is_admitted(adder, req):
            expected.admitted()
        return result


def _leaves_room(
    adder: PrefillAdder, headroom: Headroom, need: PromptNeed, expected: Expected
) -> bool:
    """Whether a newcomer waits for those who are expected back; not if nobody runs."""
    if not headroom.running and not adder.can_run_list:
        return False
    rest = headroom.free - headroom.now - need.missing - need.clip - need.ring
    return expected.must_wait(rest, adder.token_to_kv_pool_allocator.size)


def _add_one(
    adder: PrefillAdder,
    server: Server,
    headroom: Headroom,
    need: PromptNeed,
    req: Req,
    call: Callable[[], Any],
) -> Any:
    if not _has_lists_for_one_more(adder, server, req):
        return schedule_policy.AddReqResult.OTHER
    way = need.way
    with as_if_eos_counted(req.sampling_params):
        if not way.chunk:
            call = in_turn(adder, server, req, call)
            if way.way in (Way.KEEP, Way.LATER):
                with headroom.charged_also(need.ring), clip_of(need.clip):
                    return call()
            return _admit(headroom, server, need, call)
        if adder.rem_chunk_tokens < min(way.chunk, need.missing):
            # What is left of this step is no chunk worth a pass; wait for the next.
            return schedule_policy.AddReqResult.OTHER
        return _admit(
            headroom, server, need, partial(in_chunk, adder, req, way.chunk, call)
        )


def preempt(
    adder: PrefillAdder, server: Server, req: Req, call: Callable[[], bool]
) -> bool:
    """Run ``PrefillAdder.preempt_to_schedule`` with the charge of an urgent `req`."""
    headroom = Headroom.of(adder)
    if awaiting := _loans(adder):
        # Nobody is preempted for the sake of who only waits.
        awaiting.spare_all(req)
    if course_of(req) is None:
        return headroom.preempt(call)
    # SGLang matches the prefix only afterwards; until then the prompt has no length.
    req.init_next_round_input(adder.tree_cache)
    need = PromptNeed.of(req)
    assert need is not None
    passes = server.pass_scheduler
    before = len(adder.preempt_list)
    # SGLang takes the clip or max_new_tokens, but the copy is needed either way.
    with (
        all_tokens_asked(req.sampling_params),
        clip_of(need.way.step + need.ring - need.length + PAGE_SIZE + 1),
    ):
        try:
            return headroom.preempt(call)
        finally:
            passes.preempted += adder.preempt_list[before:]


def _admit(
    headroom: Headroom, server: Server, need: PromptNeed, call: Callable[[], Any]
) -> Any:
    """Run `call` if the pool can hold the prompt in this step and afterwards.

    If it could in this step but for the tails of running requests, their passes are
    made due.
    """
    way, clip, ring = need.way, need.clip, need.ring
    # One pass at a time needs a second packed copy.
    if way.later + way.copy + ring >= headroom.free - headroom.steady:
        return schedule_policy.AddReqResult.NO_TOKEN
    needed = need.missing + clip + ring + PAGE_SIZE + 1
    if not way.chunk and need.missing > longest_chunk(headroom.adder, server):
        # Decode steps come between its chunks.
        needed += len(headroom.running) * PAGE_SIZE
    missing = needed - (headroom.free - headroom.now)
    if missing > 0:
        headroom.squeeze(missing, server.pass_scheduler.due_lens)
        return schedule_policy.AddReqResult.NO_TOKEN
    # SGLang takes the clip or what is left, but the copy is needed either way.
    more = max(clip - need.left, 0) + ring
    with headroom.charged_now(way.later + ring, more), clip_of(clip):
        return call()


def add_chunked(
    adder: PrefillAdder, server: Server, req: Req, call: Callable[[], Any]
) -> Any:
    """Run ``PrefillAdder.add_chunked_req``, or put the prompt off for want of memory.

    SGLang goes on with a started prompt whatever the memory. Here running requests may
    have grown since its last chunk, so it can wait until they give memory back.
    """
    headroom, need = Headroom.of(adder), PromptNeed.of(req)
    if need is None:
        return call()
    if not headroom.running and (awaiting := _loans(adder)):
        awaiting.spare_all(req)
    way = need.way
    chunk, least = _next_chunk(adder, server, headroom, need)
    waits = chunk < least
    server.pass_scheduler.waiting_prompt = req if waits else None
    if waits:
        headroom.squeeze(least - chunk, server.pass_scheduler.due_lens)
        # No room, also for others: only one prompt can be unfinished.
        adder.rem_chunk_tokens = 0
        return req
    if way.way in (Way.KEEP, Way.LATER):
        with clip_of(max(way.step - need.length, way.later)):
            return in_chunk(adder, req, chunk, call)
    clip = need.clip if way.chunk else max(way.step - need.length, way.later)
    with headroom.charged_now(way.later, 0), clip_of(clip):
        return in_chunk(adder, req, chunk, call)


def _next_chunk(
    adder: PrefillAdder, server: Server, headroom: Headroom, need: PromptNeed
) -> tuple[int, int]:
    """Tokens of a started prompt that there is room for, and how many are worth a step.

    Without others nothing more will come: then even a page is progress.
    """
    running, way = len(headroom.running), need.way
    room = int(headroom.free - headroom.now) - PAGE_SIZE
    if way.chunk:
        room -= need.policy.budget(need.length) + PAGE_SIZE
        chunk = min(way.chunk, floor_tokens(room))
        least = need.policy.options.window if running else PAGE_SIZE
        return chunk, min(least, need.missing)
    # Whole: the next decode step, which may come before the next chunk, needs pages.
    room -= running * PAGE_SIZE
    whole = min(int(longest_chunk(adder, server)), need.missing)
    chunk = whole if room >= whole else max(floor_tokens(room), 0)
    return chunk, whole if running else min(PAGE_SIZE, need.missing)


def _has_lists_for_one_more(adder: PrefillAdder, server: Server, req: Req) -> bool:
    """Whether the page lists of a step with a folded prompt have room for one more.

    They are [L, B, H, width] for all B requests of the step, and memory is set aside
    for one of the longest, see `metadata_bytes`.
    """
    reqs = [*adder.can_run_list, req]
    resumed = any(hit_of(it) is not None for it in reqs)
    width = max(
        pages_of(len(it.full_untruncated_fill_ids))
        if resumed or ((state := state_of(it)) is not None and state.fold)
        else 0
        for it in reqs
    )
    if not width or len(reqs) == 1:
        return True
    return len(reqs) * width <= server.page_list_width
