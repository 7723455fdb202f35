"""Admission: ask a pool in use for what `course` has asked of an empty one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.scheduling.acceptance import course_of
from sglang_kvc.scheduling.course import Course, Way
from sglang_kvc.scheduling.headroom import Headroom
from sglang_kvc.scheduling.lengths import NEVER, ceil_page, floor_page
from sglang_kvc.scheduling.passes import policy_of, state_of
from sglang_kvc.scheduling.server import Server


def add_one(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_one_req`` with the charge and the chunk that fit `req`."""
    headroom = Headroom.of(adder)
    way = course_of(req)
    if way is None:
        return call()
    result = _add_one(adder, headroom, way, req, call)
    refused = result is schedule_policy.AddReqResult.NO_TOKEN
    allocator = adder.token_to_kv_pool_allocator
    alone = not adder.can_run_list and not headroom.running
    if refused and alone and headroom.free == allocator.size:
        # An empty pool has no room. It must not happen, see `course`; if it does, this
        # request ends, and the others do not wait for it. (One that has ended stays in
        # the running batch for a step, without memory, and is still charged.)
        _server(adder).pass_scheduler.stuck = req
    return result


def _add_one(
    adder: Any, headroom: Headroom, way: Course, req: Any, call: Callable[[], Any]
) -> Any:
    if not _has_lists_for_one_more(adder):
        return schedule_policy.AddReqResult.OTHER
    params = req.sampling_params
    ignore_eos, params.ignore_eos = params.ignore_eos, False
    # Without a prefix cache SGLang simulates requests that ignore EOS to their end, as
    # if they kept every token.
    try:
        clip = _clip(req, way)
        if way.way in (Way.KEEP, Way.LATER):
            return _with_clip(clip, call)
        if not way.chunk:
            return _admit(headroom, way, req, clip, partial(_with_clip, clip, call))
        left = adder.rem_chunk_tokens
        if left < min(way.chunk, _missing(req)):
            # What is left of this step is no chunk worth a pass; wait for the next.
            return schedule_policy.AddReqResult.OTHER
        with_chunk = partial(_with_chunk, adder, req, way.chunk, call, clip)
        return _admit(headroom, way, req, clip, with_chunk)
    finally:
        params.ignore_eos = ignore_eos


def preempt(adder: Any, req: Any, call: Callable[[], bool]) -> bool:
    """Run ``PrefillAdder.preempt_to_schedule`` with the charge of an urgent `req`."""
    headroom = Headroom.of(adder)
    way = course_of(req)
    if way is None:
        return headroom.preempt(call)
    # SGLang matches the prefix only afterwards; until then the prompt has no length.
    req.init_next_round_input(adder.tree_cache)
    passes = _server(adder).pass_scheduler
    before = len(adder.preempt_list)
    params = req.sampling_params
    asked, params.max_new_tokens = params.max_new_tokens, NEVER
    # SGLang takes the clip or max_new_tokens, but the copy is needed either way.
    clip = way.step - len(req.full_untruncated_fill_ids) + PAGE_SIZE + 1
    try:
        return headroom.preempt(partial(_with_clip, clip, call))
    finally:
        params.max_new_tokens = asked
        passes.preempted += adder.preempt_list[before:]


def _clip(req: Any, way: Course) -> int:
    """What SGLang has to charge beside the missing part of the prompt.

    For a prompt that is compressed between chunks the result may be negative: SGLang
    adds it to the whole prompt, of which only a part is ever held. A cached prefix is
    counted by SGLang, when it locks it, and by `Course.max_hit`.
    """
    hit = len(req.prefix_indices)
    if not way.chunk:
        return way.step - len(req.full_untruncated_fill_ids)
    policy = policy_of(req)
    assert policy is not None and policy.chunk_rule is not None
    budget = policy.budget(len(req.full_untruncated_fill_ids))
    state = state_of(req)
    held = 0 if state is not None and state.fold else hit
    peak = policy.chunk_rule.peak(budget, way.chunk, held)
    return peak - held - _missing(req)


def _admit(
    headroom: Headroom, way: Course, req: Any, clip: int, call: Callable[[], Any]
) -> Any:
    """Run `call` if the pool can hold `req` both in this step and afterwards.

    If it could in this step but for the tails of running requests, their passes are
    made due.
    """
    # One pass at a time needs a second packed copy.
    if way.later + way.copy >= headroom.free - headroom.steady:
        return schedule_policy.AddReqResult.NO_TOKEN
    # SGLang takes the clip or max_new_tokens, but the copy is needed either way.
    left = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
    more = max(clip - left, 0)
    need = _missing(req) + clip + PAGE_SIZE
    missing = need + 1 - (headroom.free - headroom.now)
    if missing > 0:
        headroom.squeeze(missing, _server(headroom.adder).pass_scheduler.due_lens)
        return schedule_policy.AddReqResult.NO_TOKEN
    return headroom.charged_now(way.later, more, call)


def add_chunked(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_chunked_req``, or put the prompt off for want of memory.

    SGLang goes on with a started prompt whatever the memory; one that is compressed
    between chunks can wait instead, holding its budget, until others have finished.
    """
    headroom = Headroom.of(adder)
    policy, way = policy_of(req), course_of(req)
    if policy is None or way is None:
        return call()
    length = len(req.full_untruncated_fill_ids)
    if not way.chunk:
        return _with_clip(max(way.step - length, way.later), call)
    room = int(headroom.free - headroom.now) - policy.budget(length) - 2 * PAGE_SIZE
    chunk = min(way.chunk, floor_page(room))
    # Without others nothing more will come: then even a short chunk is progress.
    least = policy.options.window if headroom.running else PAGE_SIZE
    waits = chunk < min(least, _missing(req))
    _server(adder).pass_scheduler.waiting_prompt = req if waits else None
    if waits:
        # No room, also for others: only one prompt can be unfinished.
        adder.rem_chunk_tokens = 0
        return req
    with_chunk = partial(_with_chunk, adder, req, chunk, call, _clip(req, way))
    return headroom.charged_now(way.later, 0, with_chunk)


def _has_lists_for_one_more(adder: Any) -> bool:
    """Whether the page lists of a step with a folded prompt have room for one more.

    They are [L, B, H, width] for all B requests of the step, and memory is set aside
    for one of the longest, see `metadata_bytes`.
    """
    width = sum(
        ceil_page(len(req.full_untruncated_fill_ids)) // PAGE_SIZE
        for req in adder.can_run_list[:1]
        if (state := state_of(req)) is not None and state.fold
    )
    if not width:
        return True
    most = _server(adder).page_list_width
    return (len(adder.can_run_list) + 1) * width <= most


def _server(adder: Any) -> Server:
    """The server that an adder of SGLang admits for."""
    server: Server = adder.token_to_kv_pool_allocator.get_kvcache().runtime
    return server


def _missing(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - len(req.prefix_indices)


def _with_chunk(
    adder: Any, req: Any, chunk: int, call: Callable[[], Any], clip: int
) -> Any:
    """Run `call` with at most `chunk` tokens left in the adder's chunk."""
    before = adder.rem_chunk_tokens
    adder.rem_chunk_tokens = min(before, chunk)
    capped = adder.rem_chunk_tokens
    result = _with_clip(clip, call)
    if req not in adder.can_run_list:
        adder.rem_chunk_tokens = before
    elif req.extend_range.end == len(req.full_untruncated_fill_ids):
        adder.rem_chunk_tokens = before - (capped - adder.rem_chunk_tokens)
        if result is schedule_policy.AddReqResult.OTHER:
            result = adder.budget_state()
    return result


def _with_clip(clip: int, call: Callable[[], Any]) -> Any:
    """Run one of PrefillAdder's methods with another clip of new tokens.

    SGLang reads the module constant CLIP_MAX_NEW_TOKENS; the scheduler is one thread.
    """
    stock = schedule_policy.CLIP_MAX_NEW_TOKENS
    schedule_policy.CLIP_MAX_NEW_TOKENS = clip
    try:
        return call()
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = stock
