"""The arena, the head-block tables and the pass plan: what every kernel reads.

Notation: L layers, H KV heads, Hq query heads, D head_dim, S = 16 tokens a page.

======================  =========================  ===================================
tensor                  shape                      meaning
======================  =========================  ===================================
``k``, ``v``            [num_pages, L, H, S, D]    the arena, contiguous
``scales``              [2, L] fp32                of stored K and V (``kv_dtype``)
``score``               [num_pages, L, H, S] fp32  running score of each stored KV
``req_to_token``        [slots, max_len] int32     SGLang's: logical position -> token
``fold_lens``           [slots] int32              logical tokens held as packed blocks
``block_offsets``       [slots, L*H + 1] int32     exclusive prefix sum of blocks a head
``packed_pages``        [slots, max_pages] int32   pages that hold the packed blocks
``query_ring``          see ``query_ring``         query of position p at ring row p % w
======================  =========================  ===================================

Address spaces. A *token* t is (page, offset) = (t // S, t % S). A *block* is the S KVs
of one head in one page: block = page * (L*H) + lh with lh = layer * H + head. A *row*
is one KV of one head: row = block * S + offset; ``k.view(-1, D)[row]`` is its key.

The resident KVs of (slot, lh) are *entries* 0 .. n-1, in logical order:

* packed: entry i < S * c, c = block_offsets[lh + 1] - block_offsets[lh]. It lies in
  packed block e = block_offsets[lh] + i // S, which is block e % (L*H) of page
  packed_pages[e // (L*H)].
* tail: the entry of logical position p >= fold_lens lies in block lh of page
  req_to_token[p] // S at offset p % S. fold_lens is a multiple of S.

A request that was never compressed has fold_lens = 0 and no packed block: all its KVs
are tail. Slot 0 is SGLang's padding row and page 0 its padding page.

The *log2-sum-exp2* of a query is log2 of the sum of 2 ** (log2(e) * sm_scale * q k)
over all entries that it sees: what softmax divides by, on the scale of the kernels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

PAGE_SIZE = 16


class Arena(NamedTuple):
    """The KV memory of all layers; shapes in the module docstring."""

    k: torch.Tensor
    v: torch.Tensor
    score: torch.Tensor
    scales: torch.Tensor | None = None
    """None unless K and V are e4m3."""

    @property
    def cells(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What there is of every KV."""
        return self.k, self.v, self.score

    def clone(self) -> "Arena":
        """Copy all tensors."""
        return Arena(*(None if part is None else part.clone() for part in self))

    @property
    def num_layers(self) -> int:
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def heads_per_page(self) -> int:
        """Head blocks in a page, L * H."""
        return self.k.shape[1] * self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[4]


class BlockTables(NamedTuple):
    """Where each request's KVs lie; shapes in the module docstring."""

    req_to_token: torch.Tensor
    fold_lens: torch.Tensor
    block_offsets: torch.Tensor
    packed_pages: torch.Tensor

    @property
    def heads_per_page(self) -> int:
        """Head blocks in a page, L * H."""
        return self.block_offsets.shape[1] - 1

    @property
    def row_strides(self) -> tuple[int, int]:
        """Cells from one slot's row to the next, of tokens and of packed pages."""
        return self.req_to_token.stride(0), self.packed_pages.stride(0)


class PlannedRequest(NamedTuple):
    """Part of a `PassPlan` for one request; its vectors in their order, on the host.

    Meanings are those of `PassPlan`; the three flags are 0 or 1.
    """

    slot: int
    seq_len: int
    fold_old: int
    fold_new: int
    query_start: int
    tail_blocks: int
    fold_blocks: int
    evict_blocks: int
    evict_most: int
    protected: int
    is_first: int
    repeated: int
    pool_tail: int
    entry_base: int
    keep_base: int

    @property
    def tail_len(self) -> int:
        """Entries of the tail of each head; padding is left out."""
        return self.seq_len - self.fold_old


class PassPlan(NamedTuple):
    """One batch of eviction passes over R requests, as device vectors and host totals.

    Every tensor is int64 of shape [R]. In this batch the workspace holds one fp32 per
    resident KV: request r's head lh starts at
    ``entry_base[r] + S * (block_offsets[slot, lh] + lh * tail_blocks[r])``, packed
    entries first, then S * tail_blocks entries of the tail (those at positions
    >= seq_len are padding).

    Attributes
    ----------
    slots : row of the request in every table (SGLang's req_pool_idx).
    seq_lens : logical length, tokens.
    fold_old, fold_new : packed logical tokens before and after the pass.
    query_start : observe the ring's queries at positions [query_start, seq_len).
    tail_blocks : ceil((seq_len - fold_old) / S), the partly filled page included.
    fold_blocks : (fold_new - fold_old) / S tail blocks a head that compete.
    evict_blocks : blocks to free, over all heads.
    evict_most : blocks that could go, over all heads, if every group that a bound is
        set for lost all that it may; see `select_entries`.
    protected : last entries a head below fold_new that must stay, tokens.
    is_first : 1 for a first pass (stored scores are ignored).
    repeated : 1 if earlier passes have observed the same queries: of the stored and
        the new score the larger one counts, not their sum.
    pool_tail : 1 if the scores of the tail are max-pooled: its entries are consecutive
        text that no pass has pooled before.
    entry_base : start of the request's part of the workspace.
    keep_base : start of its part of the kept list, a multiple of S * L * H.
    """

    slots: torch.Tensor
    seq_lens: torch.Tensor
    fold_old: torch.Tensor
    fold_new: torch.Tensor
    query_start: torch.Tensor
    tail_blocks: torch.Tensor
    fold_blocks: torch.Tensor
    evict_blocks: torch.Tensor
    evict_most: torch.Tensor
    protected: torch.Tensor
    is_first: torch.Tensor
    repeated: torch.Tensor
    pool_tail: torch.Tensor
    entry_base: torch.Tensor
    keep_base: torch.Tensor
    num_entries: int
    num_kept: int
    max_blocks: int
    """Most blocks that one head can hold in this batch: a bound the host knows."""
    any_pooled: bool
    """Whether ``pool_tail`` is 1 for any request, known to the host."""

    def requests(self) -> Iterator[PlannedRequest]:
        """Yield the plan by request, for the references: this waits for the device."""
        vectors = [field for field in self if isinstance(field, torch.Tensor)]
        for numbers in torch.stack(vectors, dim=1).tolist():
            yield PlannedRequest._make(numbers)
