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
    from sglang_kvc.options import KVCompressOptions

# A pass is planned one step late at most twice (overlap, page boundary).
SLACK = 2 * PAGE_SIZE


def attach_policy(req: Any, options: KVCompressOptions) -> None:
    """Parse the request's options; a bad request is aborted alone, with HTTP 400."""
    if policy_of(req) is not None:
        return
    try:
        request = parse_request_options(req.sampling_params.custom_params, options)
    except ConfigError as error:
        req.set_finish_with_abort(str(error))
        return
    req.kv_compress_policy = RequestPolicy(options, request)


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
    settled and then for one interval; afterwards its footprint no longer grows.
    """
    policy = policy_of(req)
    if policy is None:
        return clip
    length = len(req.full_untruncated_fill_ids)
    budget = policy.budget(length)
    if budget == NEVER:
        return clip
    if floor_page(length) > budget:
        return min(clip, budget + policy.growth + SLACK)
    due = policy.first_due(length)
    return clip if due == NEVER else min(clip, due - length + budget + SLACK)


def with_clip(req: Any, call: Callable[[], Any]) -> Any:
    """Run one of PrefillAdder's methods with the clip that fits `req`.

    SGLang reads the module constant CLIP_MAX_NEW_TOKENS; the scheduler is one thread.
    """
    clip = schedule_policy.CLIP_MAX_NEW_TOKENS
    schedule_policy.CLIP_MAX_NEW_TOKENS = new_request_clip(req, clip)
    try:
        return call()
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = clip
