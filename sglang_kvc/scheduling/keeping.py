"""What a request leaves in the pool when it ends, see `sessions.snapshot`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_kvc.config.pages import floor_tokens
from sglang_kvc.scheduling.attached import policy_of, text_of, told_by_ids
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.request_state import RequestState
from sglang_kvc.upstream.types import Req

if TYPE_CHECKING:
    from sglang_kvc.scheduling.session_tree import SessionTree


def leaves_nothing(req: Req) -> bool:
    """Whether the prefix cache must not take a request that ends."""
    policy = policy_of(req)
    return policy is not None and policy.leaves == "none"


def keep_snapshot(
    tree: SessionTree, req: Req, state: RequestState, length: int
) -> None:
    """Hand the packed pages of a request that ends to the tree, and its whole tail.

    What was handed over is the request's no longer: `RequestState.own_from` moves, and
    ``settled_packed`` is None. A request that still reads a snapshot adds its own
    tokens to that one.

    Parameters
    ----------
    tree : the prefix cache.
    req : its passes in flight have been abandoned.
    state : of the request, with packed pages or a borrowed snapshot.
    length : tokens whose KVs are written when the last launched step has run.
    """
    if tree.sessions is None or tree.disable or not _leaves_snapshot(req, state):
        return
    ids = req.origin_input_ids + req.output_ids
    end, fold = floor_tokens(min(length, len(ids))), state.settled_fold
    if end < state.own_from:
        return
    row = tree.req_to_token_pool.req_to_token[state.slot, fold:end].long()
    tail, turns = ids[fold:end], state.turns_before + 1
    if state.borrowed is not None:
        left = state.borrowed
        left.left_at, left.overdue = tree.sessions.now, False
        left.turns = max(left.turns, turns)
        if end > state.own_from:
            own = state.own_from - fold
            tree.extend_branch(state.borrowed, req, tail, row, own)
            state.own_from = end
        return
    text = text_of(req)
    replaced = tree.sessions.replaced_by(text, ids, fold)
    snapshot = tree.sessions.make(
        digest=text.prefix(ids, fold),
        fold=fold,
        packed=len(state.settled_packed),
        offsets=state.settled_offsets,
        unit=state.settled_unit,
        passes=state.generations + state.settled_passes,
        turns=turns,
    )
    tree.add_branch(snapshot, state.settled_packed)
    if end > fold:
        tree.extend_branch(snapshot, req, tail, row, 0)
    state.settled_packed, state.own_from = None, end
    for old in replaced:
        # Until somebody needs the memory: the same prompt may be asked once more.
        old.superseded = True


def may_leave_snapshot(req: Req, policy: RequestPolicy) -> bool:
    """Whether a request that ends well leaves a snapshot if it has been compressed."""
    # SGLang's own sessions look after what they have computed.
    if not told_by_ids(req) or req.session is not None:
        return False
    skipped = getattr(req, "skip_radix_cache_insert", False)
    return policy.leaves == "compressed" and not skipped


def _leaves_snapshot(req: Req, state: RequestState) -> bool:
    reason = req.finished_reason
    if reason is None or isinstance(reason, FINISH_ABORT):
        return False
    return may_leave_snapshot(req, state.policy)
