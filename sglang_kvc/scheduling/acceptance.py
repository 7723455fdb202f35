"""Accept a request or refuse it: its options, its limits, and its way back.

`course` judges; here the answer is kept with the request, and put into words for its
sender. A request without a course never enters the queue (`queueing`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sglang.srt.managers import schedule_policy

from sglang_kvc.config.pages import PAGE_SIZE, floor_tokens
from sglang_kvc.errors import ConfigError, Section, pointed
from sglang_kvc.requests.request_options import parse_request_options
from sglang_kvc.scheduling import attached
from sglang_kvc.scheduling.attached import policy_of
from sglang_kvc.scheduling.course import Course, Way, course, delayed, reach
from sglang_kvc.scheduling.lengths import tokens_left
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.refusal import Reason, Refusal
from sglang_kvc.upstream.types import Req

if TYPE_CHECKING:
    from sglang_kvc.scheduling.server import Server

OURS = {"kv_compress", "__req__"}
"""Keys of ``custom_params`` that nobody reads once the request has its policy."""


def attach_policy(req: Req, server: Server) -> None:
    """Parse the request's options; what is wrong with them is kept as its refusal."""
    if policy_of(req) is not None:
        return
    options, rule = server.options, server.chunk_rule
    custom = req.sampling_params.custom_params
    if isinstance(custom, dict) and custom.keys() <= OURS:
        # SGLang has put the request itself into the dict, for custom logit processors.
        # That circle would keep every request until the garbage collector runs.
        req.sampling_params.custom_params = None
    try:
        request = parse_request_options(custom, options)
    except ConfigError as error:
        message = pointed(str(error), Section.OPTIONS)
        attached.attach_refusal(req, Refusal(Reason.OPTIONS, message))
        return
    if not attached.told_by_ids(req):
        # The end of a prompt scores its chunks by token ids, see `probe`.
        rule = dataclasses.replace(rule, mode="never")
    ring = server.pass_scheduler.rings.tokens if request.enabled else 0
    rule = dataclasses.replace(rule, pool_tokens=rule.pool_tokens - ring)
    length = len(req.origin_input_ids)
    policy = RequestPolicy(options, request, rule, ring, prompt_len=length)
    attached.attach_policy(req, policy)


def limit_request(
    req: Req,
    server: Server,
    asked: int | None,
    max_req_len: int,
    truncate: bool = False,
) -> None:
    """Replace SGLang's limits, which assume that every token stays in the pool.

    Parameters
    ----------
    req : with ``max_new_tokens`` already limited by SGLang.
    asked : ``max_new_tokens`` before that; None: as many as there is room for.
    max_req_len : most tokens of a request, from the context length.
    truncate : cut a prompt that cannot be served (``--allow-auto-truncate``).
    """
    if req.finished_reason is not None or req.to_finish is not None:
        return
    attach_policy(req, server)
    policy = policy_of(req)
    if policy is None:
        return
    if course(policy, len(req.origin_input_ids), 0, 0) is None:
        if not truncate:
            message = _too_long(policy, len(req.origin_input_ids))
            message = pointed(message, Section.LONG_PROMPTS)
            attached.attach_refusal(req, Refusal(Reason.TOO_LONG, message))
            return
        req.origin_input_ids = req.origin_input_ids[: policy.whole_pool - 2 * PAGE_SIZE]
        policy = dataclasses.replace(policy, prompt_len=len(req.origin_input_ids))
    length = len(req.origin_input_ids)
    horizon = schedule_policy.CLIP_MAX_NEW_TOKENS
    policy = dataclasses.replace(policy, delay=0)
    most = min(max_req_len - length - 1, reach(policy, length, horizon) - length)
    if asked is not None:
        most = min(most, asked)
    params = req.sampling_params
    params.max_new_tokens = max(most, 0)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
    policy = delayed(policy, length, params.max_new_tokens, horizon)
    attached.attach_policy(req, policy)


def readmit(req: Req) -> Refusal | None:
    """Judge a request on its way (back) into the queue.

    A request that was retracted, preempted or paused has grown. It may have to be
    served in another way than before, and its output is cut to what that way can hold.

    Returns
    -------
    Refusal or None
        Why it cannot come back.
    """
    policy = policy_of(req)
    if policy is None:
        return None
    length, found = len(req.origin_input_ids) + len(req.output_ids), course_of(req)
    if found is None or found.way is Way.KEEP:
        room = policy.whole_pool - length - PAGE_SIZE - 1
    else:
        horizon = schedule_policy.CLIP_MAX_NEW_TOKENS
        room = reach(policy, length, horizon) - length
    params = req.sampling_params
    if room > 0:
        params.max_new_tokens = min(params.max_new_tokens, len(req.output_ids) + room)
        found = course_of(req)
    if found is not None:
        return None
    message = (
        f"The request was interrupted for want of memory after {len(req.output_ids)} "
        f"tokens. It has {length} tokens by now, and the KV pool of "
        f"{policy.whole_pool} cannot take them in again. Send the prompt and what has "
        "been generated, at a higher rate, or when fewer requests run."
    )
    return Refusal(Reason.OUT_OF_MEMORY, pointed(message, Section.REQUESTS))


def _too_long(policy: RequestPolicy, length: int) -> str:
    pool, budget = policy.whole_pool, policy.budget(length)
    if floor_tokens(length) <= budget:
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


def course_of(req: Req) -> Course | None:
    """Course of a request at its present length; a prefill step does not change it."""
    policy = policy_of(req)
    if policy is None:
        return None
    length = len(req.origin_input_ids) + len(req.output_ids)
    left = tokens_left(req)
    key = (length, left, policy)
    known = attached.known_course(req)
    if known is not None and known[0] == key:
        return known[1]
    found = course(policy, length, left, schedule_policy.CLIP_MAX_NEW_TOKENS)
    attached.attach_course(req, key, found)
    return found


def max_prefix_len(req: Req, input_len: int, stock: int) -> int:
    """Longest prefix hit, tokens: the last `window` must be computed to be observed.

    The hit is lossless either way; the cap costs at most `window` tokens of prefill
    and makes the scores, hence the kept set, independent of what was cached. A prompt
    that is compressed between chunks also leaves room for its first chunk: it holds the
    hit until that chunk's pass.
    """
    attached.attach_prefix_cap(req, stock)
    policy, way = policy_of(req), course_of(req)
    if policy is None or way is None or way.way is Way.KEEP:
        return stock
    end = input_len + tokens_left(req)
    if way.way is Way.LATER and policy.first_due(input_len) > end:
        return stock
    return max(min(stock, input_len - policy.options.window, way.max_hit), 0)
