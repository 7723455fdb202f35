"""Admission: validate a request's options and charge what it can still grow to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.errors import ConfigError
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.request_options import parse_request_options
from sglang_kvc.request_state import NEVER, RequestPolicy, ceil_page, floor_page
from sglang_kvc.scheduling import policy_of, state_of

if TYPE_CHECKING:
    from sglang_kvc.runtime import KVCompressRuntime

# A pass is planned one step late at most twice (overlap, page boundary).
SLACK = 2 * PAGE_SIZE


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


def growth_bound(req: Any, stock: float) -> float:
    """Tokens that a running request can still add to the pool, at most `stock`."""
    policy, state = policy_of(req), state_of(req)
    if policy is None or state is None:
        return stock
    length = req.kv_committed_len
    if state.fold:
        bound = policy.growth + SLACK - (length - state.fold)
        # With a rate the budget itself grows.
        bound += policy.budget(length + ceil_page(int(stock))) - policy.budget(length)
    else:
        due = policy.first_due(length)
        bound = due + SLACK - length if due != NEVER else int(stock)
    return min(stock, max(bound, 0))


def new_request_clip(req: Any, clip: int) -> int:
    """Most new tokens to charge a request that asks for admission.

    A prompt that will be compressed needs room for its packed copy until the pass is
    settled and then for one interval; afterwards its footprint no longer grows. For a
    prompt that is compressed between chunks the result may be negative: SGLang adds
    it to the whole prompt, of which only a part is ever held.
    """
    policy = policy_of(req)
    if policy is None:
        return clip
    length = len(req.full_untruncated_fill_ids)
    budget = policy.budget(length)
    if budget == NEVER:
        return clip
    if policy.chunk_tokens(length):
        return policy.peak_tokens(length) - (length - len(req.prefix_indices))
    if floor_page(length) > budget:
        return min(clip, budget + policy.growth + SLACK)
    due = policy.first_due(length)
    return clip if due == NEVER else min(clip, due - length + budget + SLACK)


def add_one(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_one_req`` with the charge and the chunk that fit `req`."""
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
        if not chunk:
            return _with_clip(req, call)
        if adder.rem_chunk_tokens < min(chunk, _missing(req)):
            # What is left of this step is no chunk worth a pass; wait for the next.
            return schedule_policy.AddReqResult.OTHER
        return _with_chunk(adder, req, chunk, call)
    finally:
        params.ignore_eos = ignore_eos


def add_chunked(adder: Any, req: Any, call: Callable[[], Any]) -> Any:
    """Run ``PrefillAdder.add_chunked_req``, or put the prompt off for want of memory.

    SGLang goes on with a started prompt whatever the memory; one that is compressed
    between chunks can wait instead, holding its budget, until others have finished.
    """
    policy = policy_of(req)
    length = len(req.full_untruncated_fill_ids)
    chunk = policy.chunk_tokens(length) if policy else 0
    if not policy or not chunk:
        return _with_clip(req, call)
    room = int(adder.rem_total_tokens) - policy.budget(length) - SLACK
    chunk = min(chunk, floor_page(room))
    waits = chunk < min(policy.options.window, _missing(req))
    runtime = adder.token_to_kv_pool_allocator.get_kvcache().runtime
    runtime.scheduler.waiting_prompt = req if waits else None
    if waits:
        # No room, also for others: only one prompt can be unfinished.
        adder.rem_chunk_tokens = 0
        return req
    return _with_chunk(adder, req, chunk, call)


def _missing(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - len(req.prefix_indices)


def _with_chunk(adder: Any, req: Any, chunk: int, call: Callable[[], Any]) -> Any:
    """Run `call` with at most `chunk` tokens left in the adder's chunk."""
    before = adder.rem_chunk_tokens
    adder.rem_chunk_tokens = min(before, chunk)
    capped = adder.rem_chunk_tokens
    result = _with_clip(req, call)
    if req not in adder.can_run_list:
        adder.rem_chunk_tokens = before
    elif req.extend_range.end == len(req.full_untruncated_fill_ids):
        adder.rem_chunk_tokens = before - (capped - adder.rem_chunk_tokens)
        if result is schedule_policy.AddReqResult.OTHER:
            result = adder.budget_state()
    return result


def _with_clip(req: Any, call: Callable[[], Any]) -> Any:
    """Run one of PrefillAdder's methods with the clip that fits `req`.

    SGLang reads the module constant CLIP_MAX_NEW_TOKENS; the scheduler is one thread.
    """
    clip = schedule_policy.CLIP_MAX_NEW_TOKENS
    schedule_policy.CLIP_MAX_NEW_TOKENS = new_request_clip(req, clip)
    try:
        return call()
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = clip
