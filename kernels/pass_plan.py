"""Build a `PassPlan` from plain integers: all sizes are known before any GPU work."""

from collections.abc import Sequence
from typing import TypedDict

import torch

from sglang_kvc.kernels.layout import PAGE_SIZE, PassPlan


class PassRequest(TypedDict):
    """One request of an eviction pass; see `PassPlan` for the meaning of the fields.

    ``packed_pages`` is the number of pages that hold its packed blocks before the pass
    (0 if it was never compressed). ``evict_blocks`` is over all heads and must leave
    whole pages, and so is ``evict_most``, which is no less.
    """

    slot: int
    seq_len: int
    fold_old: int
    fold_new: int
    query_start: int
    packed_pages: int
    evict_blocks: int
    evict_most: int
    protected: int
    is_first: bool
    repeated: bool
    pool_tail: bool
    recorded: bool


def kept_pages(request: PassRequest, heads_per_page: int) -> int:
    """Pages that hold the request's packed blocks after the pass."""
    held = request["packed_pages"] * heads_per_page
    held += (request["fold_new"] - request["fold_old"]) // PAGE_SIZE * heads_per_page
    return (held - request["evict_blocks"]) // heads_per_page


def _check(request: PassRequest, heads_per_page: int) -> None:
    """Raise ValueError if the request cannot be a part of a plan."""
    fold_old, fold_new = request["fold_old"], request["fold_new"]
    if fold_old % PAGE_SIZE or fold_new % PAGE_SIZE:
        raise ValueError(
            f"fold_old and fold_new must be multiples of {PAGE_SIZE}, "
            f"got {fold_old} and {fold_new}"
        )
    if not 0 <= fold_old <= fold_new <= request["seq_len"]:
        raise ValueError(
            "expected 0 <= fold_old <= fold_new <= seq_len, got "
            f"{fold_old}, {fold_new}, {request['seq_len']}"
        )
    held = request["packed_pages"] + (fold_new - fold_old) // PAGE_SIZE
    evict = request["evict_blocks"]
    if evict % heads_per_page or not 0 <= evict <= held * heads_per_page:
        raise ValueError(
            f"evict_blocks must free whole pages of {heads_per_page} blocks out of "
            f"{held}, got {evict} blocks"
        )
    most = request["evict_most"]
    if most % heads_per_page or not evict <= most <= held * heads_per_page:
        raise ValueError(
            f"evict_most must be whole pages of {heads_per_page} blocks, {evict} "
            f"blocks or more out of {held} pages, got {most}"
        )


def build_plan(
    requests: Sequence[PassRequest], heads_per_page: int, device: torch.device | str
) -> PassPlan:
    """Lay out workspace and kept list of a batch of passes.

    Parameters
    ----------
    requests : at least one; plain Python integers.
    heads_per_page : L * H.
    device : where the plan's vectors go. One copy of [16, R] int64 (R rounded up to
        even), asynchronous on CUDA: from pinned memory, which the caching host
        allocator keeps until the copy has run.

    Raises
    ------
    ValueError : no request, unaligned folds, or a pass that does not free whole pages.
    """
    if not requests:
        raise ValueError("a pass plan needs at least one request")
    columns: list[list[int]] = []
    entry_base = keep_base = max_blocks = 0
    for request in requests:
        _check(request, heads_per_page)
        fold_old = request["fold_old"]
        tail_blocks = -(-(request["seq_len"] - fold_old) // PAGE_SIZE)
        columns.append(
            [
                request["slot"],
                request["seq_len"],
                fold_old,
                request["fold_new"],
                request["query_start"],
                tail_blocks,
                (request["fold_new"] - fold_old) // PAGE_SIZE,
                request["evict_blocks"],
                request["evict_most"],
                request["protected"],
                int(request["is_first"]),
                int(request["repeated"]),
                int(request["pool_tail"]),
                int(request["recorded"]),
                entry_base,
                keep_base,
            ]
        )
        page_entries = PAGE_SIZE * heads_per_page
        entry_base += page_entries * (request["packed_pages"] + tail_blocks)
        keep_base += page_entries * kept_pages(request, heads_per_page)
        # A head holds at most the folded tokens themselves, and at most every block.
        packed = min(request["packed_pages"] * heads_per_page, fold_old // PAGE_SIZE)
        max_blocks = max(max_blocks, packed + tail_blocks)

    on_cuda = torch.device(device).type == "cuda"
    count = len(requests)
    # An even row length aligns every row to 16 bytes: kernels, which Triton specialises
    # on alignment, compile once for all R.
    host = torch.zeros(
        len(columns[0]), count + count % 2, dtype=torch.int64, pin_memory=on_cuda
    )
    host[:, :count] = torch.tensor(columns).t()
    rows = host.to(device, non_blocking=True).unbind(0)
    fields = [row[:count] for row in rows]
    all_recorded = all(request["recorded"] for request in requests)
    any_pooled = any(request["pool_tail"] for request in requests)
    totals = [entry_base, keep_base, max_blocks, all_recorded, any_pooled]
    return PassPlan._make([*fields, *totals])
