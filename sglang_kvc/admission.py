"""Admission: validate a request's options and charge what it can still grow to.

`course` says how a request is served and what that takes; here the same numbers are
asked of a pool in use. A request without a course never enters the queue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.course import (
    NEVER,
    Course,
    Way,
    ceil_page,
    course,
    floor_page,
    reach,
)
from sglang_kvc.errors import ConfigError
from sglang_kvc.headroom import Headroom
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.request_options import parse_request_options
from sglang_kvc.request_state import RequestPolicy
from sglang_kvc.scheduling import policy_of, state_of

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime


def attach_policy(req: Any, runtime: KVCompressRuntime) -> None:
    """Parse the request's options; what is wrong with them is kept as its refusal."""
    if policy_of(req) is not None:
        return
    options, rule = runtime.options, runtime.chunk_rule
    try:
        request = parse_request_options(req.sampling_params.custom_params, options)
    except ConfigError as error:
        req.kv_compress_refusal = str(error)
        return
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        # The end of a prompt scores its chunks by token ids, see `probe`.
        rule = dataclasses.replace(rule, mode="never")
    req.kv_compress_policy = RequestPolicy(options, request, rule)


def refusal_of(req: Any) -> str | None:
    """Why the request cannot be served, in words for its sender."""
    refusal: str | None = getattr(req, "kv_compress_refusal", None)
    return refusal


def limit_request(
    req: Any,
    runtime: KVCompressRuntime,
    asked: int,
    max_req_len: int,
    truncate: bool = False,
) -> None:
    """Replace SGLang's limits, which assume that every token stays in the pool.

    Parameters
    ----------
    req : with ``max_new_tokens`` already limited by SGLang.
    asked : ``max_new_tokens`` before that.
    max_req_len : most tokens of a request, from the context length.
    truncate : cut a prompt that cannot be served (``--allow-auto-truncate``).
    """
    if req.finished_reason is not None or req.to_finish is not None:
        return
    attach_policy(req, runtime)
    policy = policy_of(req)
    if policy is None:
        return
    if course(policy, len(req.origin_input_ids), 0, 0) is None:
        if not truncate:
            req.kv_compress_refusal = _too_long(policy, len(req.origin_input_ids))
            return
        req.origin_input_ids = req.origin_input_ids[
            : policy.pool_tokens - 2 * PAGE_SIZE
        ]
    length = len(req.origin_input_ids)
    most = min(asked, max_req_len - length - 1, reach(policy, length) - length)
    params = req.sampling_params
    params.max_new_tokens = max(most, 0)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)


def readmit(req: Any) -> str | None:
    """Judge a request on its way (back) into the queue.

    A request that was retracted, preempted or paused has grown. If it no longer fits
    in any way, its output is cut to what the pool can hold of it.

    Returns
    -------
    str or None
        Why it cannot come back, in words for its sender.
    """
    policy = policy_of(req)
    if policy is None or course_of(req) is not None:
        return None
    length = len(req.origin_input_ids) + len(req.output_ids)
    room = policy.pool_tokens - length - PAGE_SIZE - 1
    if room > 0:
        req.sampling_params.max_new_tokens = len(req.output_ids) + room
        if course_of(req) is not None:
            return None
    return (
        f"The request was interrupted for want of memory after {len(req.output_ids)} "
        f"tokens. It has {length} tokens by now, and the KV pool of "
        f"{policy.pool_tokens} cannot take them in again. Send the prompt and what has "
        "been generated, at a higher rate, or when fewer requests run."
    )


def _too_long(policy: RequestPolicy, length: int) -> str:
    pool, budget = policy.pool_tokens, policy.budget(length)
    if budget == NEVER or floor_page(length) <= budget:
        return (
            f"The prompt has {length} tokens, more than the KV pool of {pool}, and "
            "this request is not compressed; shorten it or ask for a higher rate, for "
            'example custom_params={"kv_compress": {"rate": 8}}.'
        )
    rule = policy.chunk_rule
    if rule is None or rule.mode == "never" or not rule.chunk_size:
        return (
            f"The prompt has {length} tokens; whole it does not fit in the KV pool of "
            f"{pool}, and this server (or a request with embeddings) does not compress "
            f"between chunks. Send at most {pool - PAGE_SIZE - 1} tokens."
        )
    return (
        f"The prompt has {length} tokens and may keep {budget}; the KV pool of {pool} "
        "cannot hold it whole, and compressing it between chunks takes twice what it "
        f"keeps and a chunk of {rule.min_chunk} or more. Ask for a higher rate or a "
        "smaller budget."
    )


def course_of(req: Any) -> Course | None:
    """The request's course at its present length; a prefill step does not change it."""
    policy = policy_of(req)
    if policy is None:
        return None
    length = len(req.origin_input_ids) + len(req.output_ids)
    left = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
    key = (length, left, policy)
    known = getattr(req, "kv_compress_course", None)
    if known is None or known[0] != key:
        horizon = schedule_policy.CLIP_MAX_NEW_TOKENS
        known = req.kv_compress_course = (key, course(policy, length, left, horizon))
    found: Course | None = known[1]
    return found


def max_prefix_len(req: Any, input_len: int, stock: int) -> int:
    """Longest prefix hit: the last `window` tokens must be computed to be observed.

    The hit is lossless either way; the cap costs at most `window` tokens of prefill
    and makes the scores, hence the kept set, independent of what was cached. A prompt
    that is compressed between chunks also leaves room for its first chunk: it holds the
    hit until that chunk's pass.
    """
    policy, way = policy_of(req), course_of(req)
    if policy is None or way is None or way.way is Way.KEEP:
        return stock
    if way.way is Way.LATER:
        left = (req.sampling_params.max_new_tokens or 0) - len(req.output_ids)
        if policy.first_due(input_len) > input_len + left:
            return stock
    return max(min(stock, input_len - policy.options.window, way.max_hit), 0)


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
        allocator.get_kvcache().runtime.scheduler.stuck = req
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
        if way.way in (Way.KEEP, Way.LATER):
            clip = way.step - len(req.full_untruncated_fill_ids)
            return _with_clip(clip, call)
        clip = _clip(req, way)
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
    passes = adder.token_to_kv_pool_allocator.get_kvcache().runtime.scheduler
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
        allocator = headroom.adder.token_to_kv_pool_allocator
        headroom.squeeze(missing, allocator.get_kvcache().runtime.scheduler.due_lens)
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
    runtime = adder.token_to_kv_pool_allocator.get_kvcache().runtime
    runtime.scheduler.waiting_prompt = req if waits else None
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
    runtime = adder.token_to_kv_pool_allocator.get_kvcache().runtime
    return (len(adder.can_run_list) + 1) * width <= runtime.tables.packed_pages.shape[1]


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
