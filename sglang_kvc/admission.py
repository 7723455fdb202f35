"""Admission: validate a request's options and charge what it can still grow to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.errors import ConfigError
from sglang_kvc.headroom import SLACK, Headroom, steady_tokens
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.request_options import parse_request_options
from sglang_kvc.request_state import NEVER, RequestPolicy, ceil_page, floor_page
from sglang_kvc.scheduling import policy_of

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime


def attach_policy(req: Any, runtime: KVCompressRuntime) -> None:
    """Parse the request's options; a bad request is aborted alone, with HTTP 400."""
    if policy_of(req) is not None:
        return
    options = runtime.options
    try:
        request = parse_request_options(req.sampling_params.custom_params, options)
    except ConfigError as error:
        req.set_finish_with_abort(str(error))
        return
    req.kv_compress_policy = RequestPolicy(options, request, runtime.chunk_rule)


def limit_request(
    req: Any, runtime: KVCompressRuntime, asked: int, max_req_len: int
) -> None:
    """Replace SGLang's limits, which assume that every token stays in the pool.

    Parameters
    ----------
    req : with ``max_new_tokens`` already limited by SGLang.
    asked : ``max_new_tokens`` before that.
    max_req_len : most tokens of a request, from the context length.
    """
    if req.finished_reason is not None or req.to_finish is not None:
        return
    attach_policy(req, runtime)
    policy = policy_of(req)
    if policy is None:
        return
    length = len(req.origin_input_ids)
    pool = runtime.chunk_rule.pool_tokens
    if fits_whole(policy, length, pool) or policy.chunk_tokens(length):
        if floor_page(length) > policy.budget(length):
            params = req.sampling_params
            most = min(asked, max_req_len - length - 1)
            params.max_new_tokens = max(longest_output(policy, length, most, pool), 0)
            params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
    elif length >= pool - PAGE_SIZE:
        req.set_finish_with_abort(_too_long(policy, length, pool))


def fits_whole(policy: RequestPolicy, length: int, pool: int) -> bool:
    """Whether a prompt and its packed copy fit in an empty pool."""
    budget = policy.budget(length)
    return budget != NEVER and length + budget + policy.growth + 2 * SLACK < pool


def longest_output(policy: RequestPolicy, length: int, most: int, pool: int) -> int:
    """Most tokens, up to `most`, that a compressed request may generate.

    A pass holds the old and the new packed copy and a tail; all must fit in the pool.
    """
    low, high = 0, max(most, 0)
    while low < high:
        middle = (low + high + 1) // 2
        budget = policy.budget(length + middle)
        if 2 * budget + policy.growth + 2 * SLACK < pool:
            low = middle
        else:
            high = middle - 1
    return low


def _too_long(policy: RequestPolicy, length: int, pool: int) -> str:
    budget = policy.budget(length)
    if budget == NEVER or floor_page(length) <= budget:
        return (
            f"The prompt has {length} tokens, more than the KV pool of {pool}, and "
            "this request is not compressed; shorten it or ask for a higher rate, for "
            'example custom_params={"kv_compress": {"rate": 8}}.'
        )
    return (
        f"The prompt has {length} tokens and may keep {budget}; the KV pool of {pool} "
        "cannot hold it whole, and compressing it between chunks takes twice what it "
        "keeps and a chunk. Ask for a higher rate or a smaller budget (and start the "
        "server without --kv-compress-chunks never)."
    )


def max_prefix_len(req: Any, input_len: int, stock: int) -> int:
    """Longest prefix hit: the last `window` tokens must be computed to be observed.

    The hit is lossless either way; the cap costs at most `window` tokens of prefill
    and makes the scores, hence the kept set, independent of what was cached.
    """
    policy = policy_of(req)
    if policy is None:
        return stock
    max_new = req.sampling_params.max_new_tokens or 0
    if not policy.may_compress(input_len, max_new):
        return stock
    return max(min(stock, input_len - policy.options.window), 0)


def new_request_clip(req: Any, clip: int) -> int:
    """Most new tokens to charge a request that asks for admission.

    A prompt that will be compressed needs room for its packed copy until the pass is
    settled. For a prompt that is compressed between chunks the result may be negative:
    SGLang adds it to the whole prompt, of which only a part is ever held. A prompt that
    is not prefilled in one step is charged for an interval too, once for all steps.
    """
    policy = policy_of(req)
    if policy is None:
        return clip
    length = len(req.full_untruncated_fill_ids)
    budget = policy.budget(length)
    if budget == NEVER:
        return clip
    if policy.chunk_tokens(length):
        return policy.peak_tokens(length) - _missing(req)
    if floor_page(length) > budget:
        return min(clip, budget + policy.growth + SLACK)
    due = policy.first_due(length)
    return clip if due == NEVER else min(clip, due - length + budget + SLACK)


def add_one(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_one_req`` with the charge and the chunk that fit `req`."""
    headroom = Headroom.of(adder)
    policy = policy_of(req)
    length = len(req.full_untruncated_fill_ids)
    if policy is None or policy.budget(length) == NEVER:
        return call()
    params = req.sampling_params
    ignore_eos, params.ignore_eos = params.ignore_eos, False
    # Without a prefix cache SGLang simulates requests that ignore EOS to their end, as
    # if they kept every token.
    try:
        chunk = policy.chunk_tokens(length)
        left = adder.rem_chunk_tokens
        if chunk and left < min(chunk, _missing(req)):
            # What is left of this step is no chunk worth a pass; wait for the next.
            return schedule_policy.AddReqResult.OTHER
        if chunk:
            peak = new_request_clip(req, schedule_policy.CLIP_MAX_NEW_TOKENS)
            admit = partial(_with_chunk, adder, req, chunk, call, peak)
            return _admit(headroom, policy, req, peak, admit)
        fits = left is None or ceil_page(_missing(req)) <= left
        if fits and floor_page(length) > policy.budget(length):
            # The pass behind this step; the page is for the first decoded token.
            copy = policy.budget(length) + PAGE_SIZE
            return _admit(headroom, policy, req, copy, partial(_with_clip, copy, call))
        clip = new_request_clip(req, schedule_policy.CLIP_MAX_NEW_TOKENS)
        return _with_clip(clip, call)
    finally:
        params.ignore_eos = ignore_eos


def _admit(
    headroom: Headroom,
    policy: RequestPolicy,
    req: Any,
    clip: int,
    call: Callable[[], Any],
) -> Any:
    """Run `call` if the pool can hold `req` both in this step and afterwards.

    If it could in this step but for the tails of running requests, their passes are
    made due.
    """
    length = len(req.full_untruncated_fill_ids)
    left = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
    max_new = min(left, schedule_policy.CLIP_MAX_NEW_TOKENS)
    steady = steady_tokens(policy, length, max_new)
    # One pass at a time needs a second packed copy.
    if steady + policy.budget(length) >= headroom.free - headroom.steady:
        return schedule_policy.AddReqResult.NO_TOKEN
    # SGLang takes the clip or max_new_tokens, but the copy is needed either way.
    more = max(clip - left, 0)
    need = _missing(req) + clip + PAGE_SIZE
    missing = need + 1 - (headroom.free - headroom.now)
    if missing > 0:
        allocator = headroom.adder.token_to_kv_pool_allocator
        headroom.squeeze(missing, allocator.get_kvcache().runtime.scheduler.due_lens)
        return schedule_policy.AddReqResult.NO_TOKEN
    return headroom.charged_now(steady, more, call)


def add_chunked(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_chunked_req``, or put the prompt off for want of memory.

    SGLang goes on with a started prompt whatever the memory; one that is compressed
    between chunks can wait instead, holding its budget, until others have finished.
    """
    headroom = Headroom.of(adder)
    policy = policy_of(req)
    length = len(req.full_untruncated_fill_ids)
    chunk = policy.chunk_tokens(length) if policy else 0
    clip = new_request_clip(req, schedule_policy.CLIP_MAX_NEW_TOKENS)
    if not policy or not chunk:
        return _with_clip(clip, call)
    room = int(headroom.free - headroom.now) - policy.budget(length) - SLACK
    chunk = min(chunk, floor_page(room))
    waits = chunk < min(policy.options.window, _missing(req))
    runtime = adder.token_to_kv_pool_allocator.get_kvcache().runtime
    runtime.scheduler.waiting_prompt = req if waits else None
    if waits:
        # No room, also for others: only one prompt can be unfinished.
        adder.rem_chunk_tokens = 0
        return req
    return _with_chunk(adder, req, chunk, call, clip)


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
