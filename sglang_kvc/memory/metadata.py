"""Bytes of our metadata, so that they are charged before the pool is sized.

Per token of KV: one fp32 score per layer and head, inside the arena. Per running
request: the rings of queries and their log-sum-exps, and the block tables. Once: the
decode and pass workspaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, pages_of
from sglang_kvc.kernels.decode_attention import make_decode_workspace
from sglang_kvc.kernels.plan_heads import PARTIAL_BYTES
from sglang_kvc.kernels.query_ring import ring_pages
from sglang_kvc.kernels.select import SCRATCH_BYTES_PER_GROUP, SCRATCH_BYTES_PER_HEAD

SCORE_BYTES = 4
LSE_DTYPE = torch.float16
"""Of recorded log-sum-exps: 0.4 % of a query's weight, the same for all keys."""
MAX_SLOTS, MIN_SLOTS = 256, 16
TOKENS_PER_SLOT = 192
"""A default slot for so many tokens of the pool: few requests hold less for long."""
GIB = 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """Shape of the model on this rank; `itemsize` is that of K and V, `query_itemsize`
    of the queries: that of the model.
    """

    num_layers: int
    num_kv_heads: int
    num_qo_heads: int
    head_dim: int
    itemsize: int
    query_itemsize: int

    @property
    def heads_per_page(self) -> int:
        """Head blocks in a page, L * H."""
        return self.num_layers * self.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    def num_groups(self, allocation: str) -> int:
        """Groups of heads that share a budget, see `select_entries`."""
        groups = {"joint": 1, "layer": self.num_layers, "head": self.heads_per_page}
        return groups[allocation]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers and heads."""
        return 2 * self.heads_per_page * self.head_dim * self.itemsize

    @property
    def score_bytes_per_token(self) -> int:
        """Bytes of the stored scores of one token."""
        return self.heads_per_page * SCORE_BYTES


@dataclass(frozen=True)
class MetadataBytes:
    """Bytes of everything that is not K or V.

    Attributes
    ----------
    per_token : scores, per token of the pool.
    ring, tables, workspace : fixed parts, see `metadata_bytes`; the ring with its
        log-sum-exps.
    """

    per_token: int
    ring: int
    tables: int
    workspace: int

    @property
    def fixed(self) -> int:
        """Bytes that do not grow with the pool."""
        return self.ring + self.tables + self.workspace

    def scale_kv_bytes(self, available: int, shape: ModelShape) -> int:
        """Bytes to offer for K and V out of `available` for K, V and our metadata."""
        rest = max(available - self.fixed, 0)
        kv = shape.kv_bytes_per_token
        return int(rest * kv / (kv + self.per_token))

    def describe_fixed(self) -> str:
        """Describe the parts that do not grow with the pool, for an error message."""
        return (
            f"{self.fixed / GIB:.2f} GiB (query ring {self.ring / GIB:.2f}, workspace "
            f"{self.workspace / GIB:.2f}, tables {self.tables / GIB:.2f})"
        )

    def describe(self, kv_bytes: int, tokens: int) -> str:
        """Describe the sum in one line for the start-up log."""
        scores = self.per_token * tokens
        total = self.fixed + scores
        return (
            f"KV-Compress metadata: {total / GIB:.3f} GiB = "
            f"{100 * total / max(kv_bytes, 1):.2f} % of {kv_bytes / GIB:.2f} GiB of KV "
            "(scores, query rings, block tables, workspace)"
        )


def default_slots(pool_tokens: int) -> int:
    """Running requests to prepare for, unless --max-running-requests says it."""
    return max(MIN_SLOTS, min(MAX_SLOTS, pool_tokens // TOKENS_PER_SLOT))


def pass_workspace_tokens(context_len: int, pool_tokens: int) -> int:
    """Most resident tokens per head that one launch of passes works on.

    A pass of one request of any legal length must fit, and no request holds more than
    the pool; smaller ones share a launch.
    """
    return ceil_tokens(min(context_len, pool_tokens)) + PAGE_SIZE


def count_bytes(shape: ModelShape, options: KVCompressOptions) -> int:
    """Bytes per head of what `select_entries` counts, for one request at most."""
    allocations = {options.allocation, options.chunk_allocation}
    # A bound on what layers lose is a selection by layer before the joint one.
    count = max(map(shape.num_groups, allocations)) + (options.least_layer_share > 0)
    groups = SCRATCH_BYTES_PER_GROUP * count
    return SCRATCH_BYTES_PER_HEAD + -(-groups // shape.heads_per_page)


def pass_head_bytes(entries: int, kept: int, counts: int, *, pooled: bool) -> int:
    """Workspace of one request's pass, bytes per head.

    Parameters
    ----------
    entries, kept : tokens per head before and after, on average.
    counts : from `count_bytes`.
    pooled : whether scores are pooled, into a second copy.

    Returns
    -------
    int
        The most that is held at once: scores and pooled scores, or the scores, the
        survivors' rows and scores and the counts.
    """
    scores = SCORE_BYTES * entries
    return scores + max(scores if pooled else 0, 2 * SCORE_BYTES * kept + counts)


def workspace_head_bytes(
    shape: ModelShape, options: KVCompressOptions, context_len: int, pool_tokens: int
) -> int:
    """Workspace set aside for the passes of one launch, bytes per head.

    Enough for the longest request. The survivors are counted for a rate of 2 or the
    server's own, if that is less.
    """
    entries = pass_workspace_tokens(context_len, pool_tokens)
    rate = options.keep.rate
    kept = entries if rate is not None and rate < 2 else entries // 2
    counts = count_bytes(shape, options)
    return pass_head_bytes(entries, kept, counts, pooled=True)


def metadata_bytes(
    shape: ModelShape,
    options: KVCompressOptions,
    *,
    max_running_requests: int,
    context_len: int,
    pool_tokens: int,
    chunk_size: int = 0,
) -> MetadataBytes:
    """Bytes of our metadata for a server of this shape.

    Parameters
    ----------
    max_running_requests : request slots, without the padding slot.
    context_len : longest request, tokens.
    pool_tokens : tokens of the KV pool, or more.
    chunk_size : tokens of a prefill step, if prompts can be compressed between chunks.

    Returns
    -------
    MetadataBytes
        The pass workspace is the most that `PassRunner` holds at once
        (`workspace_head_bytes`). A chunk of a compressed prompt takes, at another time,
        page lists of all heads and copies of the queries and outputs of one layer.
    """
    slots = max_running_requests + 1
    pages = ring_pages(options.window, shape.group, shape.itemsize)
    rows = shape.num_layers * options.window * shape.num_qo_heads
    ring = slots * (
        pages * PAGE_SIZE * shape.kv_bytes_per_token + rows * LSE_DTYPE.itemsize
    )
    partials = make_decode_workspace(
        max_running_requests,
        shape.num_qo_heads,
        shape.head_dim,
        device="meta",
        num_kv_heads=shape.num_kv_heads,
        num_layers=shape.num_layers,
    )
    decode_workspace = sum(part.nbytes for part in partials)
    table_ints = 1 + (shape.heads_per_page + 1) + pages_of(context_len)
    head_bytes = workspace_head_bytes(shape, options, context_len, pool_tokens)
    workspace = shape.heads_per_page * head_bytes + PARTIAL_BYTES
    lists = pages_of(context_len) * shape.heads_per_page * 4
    copied = shape.num_qo_heads * shape.head_dim * shape.query_itemsize
    copies = 2 * chunk_size * copied
    workspace = max(workspace, (lists + copies) if chunk_size else 0)
    return MetadataBytes(
        per_token=shape.score_bytes_per_token,
        ring=ring,
        tables=slots * table_ints * 4,
        workspace=decode_workspace + workspace,
    )
