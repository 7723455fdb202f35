"""Bytes of our metadata, so that they are charged before the pool is sized.

Per token of KV: one fp32 score per layer and head, inside the arena. Per request slot:
the block tables. Once: the decode workspace.

The queries themselves lie in pages of the pool, and only for requests that can be
compressed (`scheduling.rings`). The workspace of passes and chunks takes the memory
that SGLang leaves for the activations of a prefill step, which are gone by then; what
does not fit there is charged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, pages_of
from sglang_kvc.kernels.decode_attention import make_decode_workspace
from sglang_kvc.kernels.plan_heads import PARTIAL_BYTES
from sglang_kvc.kernels.query_ring import ring_pages
from sglang_kvc.kernels.select import SCRATCH_BYTES_PER_GROUP, SCRATCH_BYTES_PER_HEAD

SCORE_BYTES = 4
LSE_BYTES = 4
MAX_SLOTS, MIN_SLOTS = 256, 16
TOKENS_PER_SLOT = 64
"""A default slot for so many tokens of the pool: few requests hold less for long."""
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """Shape of the model on this rank; `itemsize` is that of K and V, `query_itemsize`
    of the queries: that of the model. `mlp_width`: elements that an MLP makes of a
    token at once; 0: not known.
    """

    num_layers: int
    num_kv_heads: int
    num_qo_heads: int
    head_dim: int
    itemsize: int
    query_itemsize: int
    mlp_width: int = 0

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
    tables, workspace : fixed parts, see `metadata_bytes`.
    ring : of the pool, the queries of a request that can be compressed.
    """

    per_token: int
    tables: int
    workspace: int
    ring: int

    @property
    def fixed(self) -> int:
        """Bytes that do not grow with the pool."""
        return self.tables + self.workspace

    def scale_kv_bytes(self, available: int, shape: ModelShape) -> int:
        """Bytes to offer for K and V out of `available` for K, V and our metadata."""
        rest = max(available - self.fixed, 0)
        kv = shape.kv_bytes_per_token
        return int(rest * kv / (kv + self.per_token))

    def describe_fixed(self) -> str:
        """Describe the parts that do not grow with the pool, for an error message."""
        return (
            f"{self.fixed / GIB:.2f} GiB (workspace {self.workspace / GIB:.2f}, "
            f"tables {self.tables / GIB:.2f})"
        )

    def describe(self, kv_bytes: int, tokens: int) -> str:
        """Describe the sum in one line for the start-up log."""
        scores = self.per_token * tokens
        total = self.fixed + scores
        return (
            f"KV-Compress metadata: {total / GIB:.3f} GiB = "
            f"{100 * total / max(kv_bytes, 1):.2f} % of {kv_bytes / GIB:.2f} GiB of KV "
            "(scores, block tables, workspace); of the KV "
            f"{self.ring / MIB:.2f} MiB more for every running request that can be "
            "compressed"
        )


def mlp_width(model_config: Any, tp_size: int) -> int:
    """`ModelShape.mlp_width` of SGLang's ModelConfig: gate and up of a dense model."""
    config = getattr(model_config, "hf_text_config", None)
    sizes = [
        getattr(config, name, None) or 0
        for name in ("num_experts", "num_local_experts", "n_routed_experts")
    ]
    if any(sizes):
        return 0
    return 2 * (getattr(config, "intermediate_size", None) or 0) // tp_size


def packed_width(context_len: int, pool_tokens: int) -> int:
    """Packed pages that a request can hold: none is longer, none has more than all."""
    return min(pages_of(context_len), pages_of(pool_tokens) + 1)


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


def lse_bytes(shape: ModelShape, options: KVCompressOptions) -> int:
    """Bytes per head of the log-sum-exps that a pass works out for one request."""
    return LSE_BYTES * options.window * shape.group


def pass_head_bytes(
    entries: int, kept: int, *, counts: int, lse: int, pooled: bool
) -> int:
    """Workspace of one request's pass, bytes per head.

    Parameters
    ----------
    entries, kept : tokens per head before and after, on average.
    counts, lse : from `count_bytes` and `lse_bytes`.
    pooled : whether scores are pooled, into a second copy.

    Returns
    -------
    int
        The most that is held at once: scores and log-sum-exps, or scores and pooled
        scores, or the scores, the survivors' rows and scores and the counts.
    """
    scores = SCORE_BYTES * entries
    pools = scores if pooled else 0
    return scores + max(lse, pools, 2 * SCORE_BYTES * kept + counts)


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
    lse = lse_bytes(shape, options)
    return pass_head_bytes(entries, kept, counts=counts, lse=lse, pooled=True)


def activation_bytes(shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Bytes that a prefill step of `tokens` tokens takes for a time.

    Returns
    -------
    whole, beside : of the step, at the least; and by how much its MLPs take more than
        its attention (query, key, value and output).
    """
    attention = 2 * (shape.num_qo_heads + shape.num_kv_heads) * shape.head_dim
    size = tokens * shape.query_itemsize
    beside = max(shape.mlp_width - attention, 0)
    return size * (attention + beside), size * beside


def metadata_bytes(
    shape: ModelShape,
    options: KVCompressOptions,
    *,
    max_running_requests: int,
    context_len: int,
    pool_tokens: int,
    chunk_size: int = 0,
    prefill_tokens: int = 0,
) -> MetadataBytes:
    """Bytes of our metadata for a server of this shape.

    Parameters
    ----------
    max_running_requests : request slots, without the padding slot.
    context_len : longest request, tokens.
    pool_tokens : tokens of the KV pool, or more.
    chunk_size : tokens of a prefill step, if prompts can be compressed between chunks.
    prefill_tokens : of a prefill step, whose activations SGLang leaves memory for; 0:
        prompts are prefilled whole, and nothing is known of them.

    Returns
    -------
    MetadataBytes
        The workspace is that of decode attention, and what of two others exceeds the
        activations of a prefill step. A pass, behind all of them, takes what
        `PassRunner` holds at once (`workspace_head_bytes`). A chunk of a compressed
        prompt takes page lists of all heads, and in attention copies of the queries and
        outputs of one layer.
    """
    slots = max_running_requests + 1
    pages = ring_pages(options.window, shape.group, shape.itemsize)
    partials = make_decode_workspace(
        max_running_requests,
        shape.num_qo_heads,
        shape.head_dim,
        device="meta",
        num_kv_heads=shape.num_kv_heads,
        num_layers=shape.num_layers,
    )
    decode_workspace = sum(part.nbytes for part in partials)
    width = packed_width(context_len, pool_tokens)
    table_ints = 1 + (shape.heads_per_page + 1) + width + pages
    head_bytes = workspace_head_bytes(shape, options, context_len, pool_tokens)
    workspace = shape.heads_per_page * head_bytes + PARTIAL_BYTES
    lists = pages_of(context_len) * shape.heads_per_page * 4
    copied = shape.num_qo_heads * shape.head_dim * shape.query_itemsize
    chunks = (lists + 2 * chunk_size * copied) if chunk_size else 0
    whole, beside = activation_bytes(shape, prefill_tokens)
    return MetadataBytes(
        per_token=shape.score_bytes_per_token,
        tables=slots * table_ints * 4,
        workspace=decode_workspace + max(workspace - whole, chunks - beside, 0),
        ring=pages * PAGE_SIZE * shape.kv_bytes_per_token,
    )
