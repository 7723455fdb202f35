"""Give back the memory that one pass has replaced, to the tree or to the allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixKey

if TYPE_CHECKING:
    from sglang_kvc.scheduling.request_state import PassRecord


def settle_record(tree_cache: Any, record: PassRecord) -> None:
    """Give back what one pass replaced; see `PassScheduler.settle`."""
    row = tree_cache.req_to_token_pool.req_to_token[record.slot]
    if record.is_first:
        _settle_first(tree_cache, record, row)
    else:
        _settle_periodic(tree_cache, record, row)
    record.state.settle(record)
    # Keeps SGLang's formula for a running request's own pages right:
    # allocated - protected = budget + tail.
    record.req.cache_protected_len = record.fold_new - record.budget


def _settle_first(tree_cache: Any, record: PassRecord, row: Any) -> None:
    """Hand the folded token pages to the tree (unlocked) or to the allocator."""
    req = record.req
    allocator = tree_cache.token_to_kv_pool_allocator
    start, end = req.cache_protected_len, record.fold_new
    freed_end = end
    if not tree_cache.disable and not getattr(req, "skip_radix_cache_insert", False):
        token_ids = (req.origin_input_ids + req.output_ids)[:end]
        result = tree_cache.insert(
            InsertParams(
                key=RadixKey(token_ids, req.extra_key),
                value=row[:end].long(),
                priority=getattr(req, "priority", 0) or 0,
            )
        )
        freed_end = result.prefix_len
    # Pages that the tree already holds in another copy, or that nobody keeps.
    if freed_end > start:
        allocator.free_segment(row[start:freed_end].long(), start_pos=start)
    if req.last_node is not None:
        tree_cache.dec_lock_ref(req.last_node)
    req.last_node = tree_cache.root_node
    req.prefix_indices = req.prefix_indices[:0]


def _settle_periodic(tree_cache: Any, record: PassRecord, row: Any) -> None:
    """Free the packed pages and the folded tail pages that the pass has read."""
    allocator = tree_cache.token_to_kv_pool_allocator
    allocator.free_segment(record.state.settled_packed, start_pos=0)
    folded = row[record.fold_old : record.fold_new].long()
    allocator.free_segment(folded, start_pos=0)
