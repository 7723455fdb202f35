"""Build a `PassPlan` from plain integers: all sizes are known before any GPU work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_kvc.kernels.layout import PAGE_SIZE, PassPlan, PlannedRequest


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """One request of an eviction pass.

    Attributes
    ----------
    packed_pages : pages that hold its packed blocks before the pass, 0 if it was never
        compressed.
    evict_pages : pages' worth of blocks to free, over all heads.
    evict_most_pages : pages' worth of blocks that could go; no less.

    The other fields are those of `PassPlan`.

    Raises
    ------
    ValueError : unaligned or unordered folds, or more goes than there is.
    """

    slot: int
    seq_len: int
    fold_old: int
    fold_new: int
    query_start: int
    packed_pages: int
    evict_pages: int
    evict_most_pages: int
    protected: int
    is_first: bool
    repeated: bool
    pool_tail: bool

    def __post_init__(self) -> None:
        if self.fold_old % PAGE_SIZE or self.fold_new % PAGE_SIZE:
            raise ValueError(
                f"fold_old and fold_new must be multiples of {PAGE_SIZE}, "
                f"got {self.fold_old} and {self.fold_new}"
            )
        if not 0 <= self.fold_old <= self.fold_new <= self.seq_len:
            raise ValueError(
                "expected 0 <= fold_old <= fold_new <= seq_len, got "
                f"{self.fold_old}, {self.fold_new}, {self.seq_len}"
            )
        held = self.packed_pages + self.fold_blocks
        if not 0 <= self.evict_pages <= self.evict_most_pages <= held:
            raise ValueError(
                f"expected 0 <= evict_pages <= evict_most_pages <= {held}, the pages "
                f"that compete, got {self.evict_pages} and {self.evict_most_pages}"
            )

    @property
    def tail_blocks(self) -> int:
        """Blocks of a head's tail, the partly filled one included."""
        return -(-(self.seq_len - self.fold_old) // PAGE_SIZE)

    @property
    def fold_blocks(self) -> int:
        """Blocks of a head's tail that compete."""
        return (self.fold_new - self.fold_old) // PAGE_SIZE

    @property
    def kept_pages(self) -> int:
        """Pages that hold the request's packed blocks after the pass."""
        return self.packed_pages + self.fold_blocks - self.evict_pages


def build_plan(
    requests: Sequence[PassRequest], heads_per_page: int, device: torch.device | str
) -> PassPlan:
    """Lay out workspace and kept list of a batch of passes.

    Parameters
    ----------
    requests : at least one.
    heads_per_page : L * H.
    device : where the plan's vectors go. One copy of [15, R] int64 (R rounded up to
        even), asynchronous on CUDA: from pinned memory, which the caching host
        allocator keeps until the copy has run.

    Raises
    ------
    ValueError : no request.
    """
    if not requests:
        raise ValueError("a pass plan needs at least one request")
    planned: list[PlannedRequest] = []
    entry_base = keep_base = max_blocks = 0
    for request in requests:
        planned.append(
            PlannedRequest(
                slot=request.slot,
                seq_len=request.seq_len,
                fold_old=request.fold_old,
                fold_new=request.fold_new,
                query_start=request.query_start,
                tail_blocks=request.tail_blocks,
                fold_blocks=request.fold_blocks,
                evict_blocks=request.evict_pages * heads_per_page,
                evict_most=request.evict_most_pages * heads_per_page,
                protected=request.protected,
                is_first=int(request.is_first),
                repeated=int(request.repeated),
                pool_tail=int(request.pool_tail),
                entry_base=entry_base,
                keep_base=keep_base,
            )
        )
        page_entries = PAGE_SIZE * heads_per_page
        entry_base += page_entries * (request.packed_pages + request.tail_blocks)
        keep_base += page_entries * request.kept_pages
        # A head holds at most the folded tokens themselves, and at most every block.
        every_block = request.packed_pages * heads_per_page
        packed = min(every_block, request.fold_old // PAGE_SIZE)
        max_blocks = max(max_blocks, packed + request.tail_blocks)

    on_cuda = torch.device(device).type == "cuda"
    count = len(requests)
    # An even row length aligns every row to 16 bytes: kernels, which Triton specialises
    # on alignment, compile once for all R.
    shape = (len(PlannedRequest._fields), count + count % 2)
    host = torch.zeros(shape, dtype=torch.int64, pin_memory=on_cuda)
    host[:, :count] = torch.tensor(planned).t()
    rows = host.to(device, non_blocking=True)[:, :count].unbind(0)
    # A plan has the vectors of its requests' numbers first, then its totals.
    vectors = dict(zip(PassPlan._fields, rows, strict=False))
    return PassPlan(
        **vectors,
        num_entries=entry_base,
        num_kept=keep_base,
        max_blocks=max_blocks,
        any_pooled=any(request.pool_tail for request in requests),
    )
