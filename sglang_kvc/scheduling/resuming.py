"""Let a request start from a snapshot of its text instead of computing it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.config.pages import floor_tokens
from sglang_kvc.scheduling.attached import (
    attach_hit,
    attach_policy,
    hit_of,
    policy_of,
    prefix_cap_of,
    text_of,
    told_by_ids,
)
from sglang_kvc.scheduling.course import course, reach
from sglang_kvc.scheduling.lengths import tokens_left
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.scheduling.session_tree import row_of
from sglang_kvc.scheduling.step_plan import Resumed
from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import PrefillAdder, Req

if TYPE_CHECKING:
    from sglang_kvc.scheduling.session_tree import SessionTree


def find_hit(tree: SessionTree, req: Req) -> Hit | None:
    """Find the snapshot that a waiting request should start from.

    SGLang has matched its whole prefix just before. That is lossless and wins if it
    reaches as far, or as far as any may. The snapshot counts as used afterwards either
    way, so of a text that is held both ways the whole copy is evicted first.

    Returns
    -------
    Hit or None
        None if nothing is held of the text, or nothing that is rich enough for it.
    """
    policy, store = policy_of(req), getattr(tree, "sessions", None)
    if not store or tree.disable or policy is None:
        return None
    if not policy.resumes or not told_by_ids(req) or req.session is not None:
        return None
    ids = req.full_untruncated_fill_ids
    cap = floor_tokens(prefix_cap_of(req))
    for snapshot in store.along(text_of(req), ids, cap):
        if snapshot.packed < policy.budget(snapshot.fold):
            continue
        hit = tree.find_branch(snapshot, ids[snapshot.fold : cap])
        if hit is None:
            continue
        most = floor_tokens(len(ids) - policy.options.window)
        whole_wins = UPSTREAM.prefix_len(req) >= min(hit.tokens, most)
        return hit if not whole_wins and _is_served_from(hit, policy, req) else None
    return None


def _is_served_from(hit: Hit, policy: RequestPolicy, req: Req) -> bool:
    """Whether an empty pool serves the request to its end from there."""
    kept, length = _keeping(policy, hit), len(req.full_untruncated_fill_ids)
    left = tokens_left(req)
    way = course(kept, length, left, schedule_policy.CLIP_MAX_NEW_TOKENS)
    if way is None or hit.held > way.max_hit:
        return False
    return length + left <= reach(kept, length)


def _keeping(policy: RequestPolicy, hit: Hit) -> RequestPolicy:
    return replace(policy, least_budget=hit.snapshot.packed)


@contextmanager
def starting_from(hit: Hit | None, adder: PrefillAdder, req: Req) -> Iterator[None]:
    """Let SGLang see a hit as the prefix of a request while it may be admitted.

    SGLang locks the node of the prefix of whom it admits: that is the loan. From then
    on the request keeps at least what the snapshot does, as admission counts.
    """
    if hit is None:
        yield
        return
    policy = policy_of(req)
    assert policy is not None
    before = UPSTREAM.prefix(req)
    attach_policy(req, _keeping(policy, hit))
    UPSTREAM.set_prefix(req, UPSTREAM.prefix_at(row_of(hit), hit.node))
    attach_hit(req, hit)
    try:
        yield
    finally:
        if not is_admitted(adder, req):
            UPSTREAM.set_prefix(req, before)
            attach_hit(req, None)
            attach_policy(req, policy)


def is_admitted(adder: PrefillAdder, req: Req) -> bool:
    """Whether the request that was looked at last was admitted."""
    return bool(adder.can_run_list) and adder.can_run_list[-1] is req


def resume(tree: Any, req: Req, state: RequestState) -> Resumed | None:
    """Start the state of an admitted request from its hit; None if it has none."""
    hit = hit_of(req)
    if hit is None:
        return None
    attach_hit(req, None)
    state.resume(hit)
    tree.note_packed(state)
    tree.sessions.hits += 1
    return Resumed(state.slot, hit.snapshot, hit.packed_tokens)


def forget_hit(req: Req) -> None:
    """A request waits (again): it may start from something else, or from nothing."""
    policy = policy_of(req)
    if policy is not None and policy.least_budget:
        attach_policy(req, replace(policy, least_budget=0))
