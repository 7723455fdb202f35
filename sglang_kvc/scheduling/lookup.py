"""Find the snapshot of its text that a request starts from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.managers import schedule_policy

from sglang_kvc.config.pages import floor_tokens
from sglang_kvc.scheduling.attached import (
    policy_of,
    prefix_cap_of,
    text_of,
    told_by_ids,
)
from sglang_kvc.scheduling.course import course, reach
from sglang_kvc.scheduling.lengths import tokens_left
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.sessions.snapshot import Hit
from sglang_kvc.sessions.tree import SnapshotTree
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req


def find_hit(tree: SnapshotTree, req: Req) -> Hit | None:
    """Find the snapshot that a waiting request should start from.

    SGLang has matched its whole prefix just before. That is lossless and wins if it
    reaches as far, or as far as any may. The snapshot counts as used afterwards either
    way, so of a text that is held both ways the whole copy is evicted first.

    Returns
    -------
    Hit or None
        None if nothing is held of the text, or nothing that is rich enough for it.
    """
    policy = _resuming(tree, req)
    if policy is None:
        return None
    ids = req.full_untruncated_fill_ids
    hit = _longest(tree, req, policy, ids, floor_tokens(prefix_cap_of(req)))
    if hit is None:
        return None
    most = floor_tokens(len(ids) - policy.options.window)
    whole_wins = UPSTREAM.prefix_len(req) >= min(hit.tokens, most)
    return hit if not whole_wins and _is_served_from(hit, policy, req) else None


def find_for_queued(tree: SnapshotTree, req: Req) -> Hit | None:
    """Find the snapshot that a request will start from which SGLang has not looked at.

    This counts as a use of it, too.
    """
    policy = _resuming(tree, req)
    if policy is None:
        return None
    ids = req.origin_input_ids + req.output_ids
    return _longest(tree, req, policy, ids, floor_tokens(len(ids) - 1))


def _resuming(tree: SnapshotTree, req: Req) -> RequestPolicy | None:
    """Policy of a request that may start from a snapshot; else None."""
    policy, store = policy_of(req), getattr(tree, "sessions", None)
    if not store or tree.disable or policy is None:
        return None
    if not policy.resumes or not told_by_ids(req) or req.session is not None:
        return None
    return policy


def _longest(
    tree: SnapshotTree, req: Req, policy: RequestPolicy, ids: Any, cap: int
) -> Hit | None:
    """What is held of the longest prefix of `ids` and is rich enough for a request."""
    assert tree.sessions is not None
    for snapshot in tree.sessions.along(text_of(req), ids, cap):
        if snapshot.packed < policy.compressed(snapshot.fold):
            continue
        if tree.sessions.is_in_host(snapshot) and not tree.bring_back(snapshot):
            continue
        hit = tree.find_branch(snapshot, ids[snapshot.fold : cap])
        if hit is not None:
            return hit
    return None


def _is_served_from(hit: Hit, policy: RequestPolicy, req: Req) -> bool:
    """Whether an empty pool serves the request to its end from there."""
    kept, length = keeping(policy, hit), len(req.full_untruncated_fill_ids)
    left = tokens_left(req)
    horizon = schedule_policy.CLIP_MAX_NEW_TOKENS
    way = course(kept, length, left, horizon)
    if way is None or hit.held > way.max_hit:
        return False
    return length + left <= reach(kept, length, horizon)


def keeping(policy: RequestPolicy, hit: Hit) -> RequestPolicy:
    """Policy of a request that starts from a hit: it keeps at least as much."""
    return replace(policy, least_budget=hit.snapshot.packed)
