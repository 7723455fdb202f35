"""Give back the memory that one pass has replaced, to the tree or to the allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import InsertParams

from sglang_kvc.scheduling.attached import text_of
from sglang_kvc.scheduling.keeping import may_leave_snapshot
from sglang_kvc.upstream.generation import UPSTREAM

if TYPE_CHECKING:
    import torch

    from sglang_kvc.scheduling.request_state import PassInFlight
    from sglang_kvc.upstream.types import TreeCache


def settle_pass(tree_cache: TreeCache, launched: PassInFlight) -> None:
    """Give back what one pass replaced; see `PassScheduler.settle`."""
    decision = launched.decision
    row = tree_cache.req_to_token_pool.req_to_token[decision.slot]
    if decision.is_first:
        _settle_first(tree_cache, launched, row)
    else:
        _settle_periodic(tree_cache, launched, row)
    launched.state.settle(launched)
    tree_cache.note_packed(launched.state)
    # Keeps SGLang's formula for a running request's own pages right:
    # allocated - protected = packed + tail.
    own = decision.fold_new - decision.packed_new
    UPSTREAM.set_protected_len(launched.req, own)


def _settle_first(
    tree_cache: TreeCache, launched: PassInFlight, row: torch.Tensor
) -> None:
    """Hand the folded token pages to the tree (unlocked) or to the allocator."""
    req = launched.req
    start, end = UPSTREAM.protected_len(req), launched.decision.fold_new
    pages = row[:end].long()
    leaves = launched.state.policy.leaves != "none"
    inserts = leaves and not getattr(req, "skip_radix_cache_insert", False)
    if not tree_cache.disable and inserts:
        token_ids = (req.origin_input_ids + req.output_ids)[:end]
        prompt = InsertParams(
            key=UPSTREAM.radix_key(token_ids, req),
            value=pages,
            priority=getattr(req, "priority", 0) or 0,
        )
        tree_cache.hand_over(req, prompt, start)
        packed = may_leave_snapshot(req, launched.state.policy)
        if tree_cache.sessions is not None and packed:
            # It goes before any snapshot does: the request holds the text, too.
            digest = text_of(req).prefix(token_ids, end)
            tree_cache.sessions.note_whole(digest, prompt.key)
    elif end > start:
        allocator = tree_cache.token_to_kv_pool_allocator
        allocator.free_segment(pages[start:], start_pos=start)
    UPSTREAM.release_prefix(tree_cache, req)


def _settle_periodic(
    tree_cache: TreeCache, launched: PassInFlight, row: torch.Tensor
) -> None:
    """Free the packed pages and the folded tail pages that the pass has read.

    What is borrowed of a snapshot is given back instead.
    """
    allocator, state = tree_cache.token_to_kv_pool_allocator, launched.state
    if state.borrowed is None:
        allocator.free_segment(state.settled_packed, start_pos=0)
    else:
        UPSTREAM.release_prefix(tree_cache, launched.req)
        replaced = state.borrowed
        state.give_back()
        # The request holds a copy of its own, which it will leave in this one's place.
        leaves = may_leave_snapshot(launched.req, state.policy)
        if replaced.is_private and leaves:
            replaced.superseded = True
    folded = row[state.own_from : launched.decision.fold_new].long()
    if len(folded):
        allocator.free_segment(folded, start_pos=0)
