"""Small batches on which a kernel must match its reference before it is timed."""

from __future__ import annotations

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import CheckError, require_close, require_equal
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.eviction.runner import pooling
from sglang_kvc.kernels.append import append_kv, append_kv_ref
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.ops import OPS, Call, Op, outcome
from sglang_kvc.kernels.testing import Case, make_case

DEFAULTS = KVCompressOptions()
METRIC, WINDOW, SINKS = DEFAULTS.metric, DEFAULTS.window, DEFAULTS.sinks
POOL = pooling(DEFAULTS)
POWER = 2
SCORE_TOLERANCE = 1e-3
PLAIN = "observe, no value norms"
"""The stage ``observe`` of the paper's metric, which leaves values out."""
DISTINCT = "distinct"
"""What ``--kv-compress-distinct`` adds behind ``pool``."""
STAGES = {
    "observe_scores": "observe",
    "pool_scores": "pool",
    "add_novelty": DISTINCT,
    "select_entries": "select",
    "pack_entries": "pack",
    "commit_tables": "commit",
}
"""Stages of a pass by op."""


def small_case(device: str, shape: Shape, *, folded: bool = True) -> Case:
    """First and later passes, partly filled pages; equal at every call.

    Without `folded` all are first passes.

    Layers, heads and the alignment of the tables' rows are those of the batches that
    are timed: Triton compiles nothing twice, and what is checked is what is timed.
    """
    return make_case(
        [700, 1275, 848, 2096],
        [0, 0, 768, 2000] if folded else [0] * 4,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        group=shape.qo_heads // shape.kv_heads,
        head_dim=shape.head_dim,
        dtype=torch.bfloat16,
        device=device,
        window=WINDOW,
    )


def check_pass(device: str, shape: Shape) -> dict[str, str]:
    """Run every stage and its reference on the same inputs.

    Returns
    -------
    dict : what is wrong, by stage; empty if nothing is.
    """
    wrong: dict[str, str] = {}
    for folded in (True, False):
        case = small_case(device, shape, folded=folded)
        for op in OPS:
            for call in op.make_calls(case) if op.name in STAGES else ():
                plain = call.settings.get("value_norms") is False
                stage = PLAIN if plain else STAGES[op.name]
                try:
                    _require_alike(stage, op, call)
                except CheckError as error:
                    wrong[stage] = str(error)
    return wrong


def _require_alike(stage: str, op: Op, call: Call) -> None:
    """Raise CheckError unless what `op` gives and leaves is what its reference does."""
    for got, want in zip(
        outcome(op.run, call), outcome(op.reference, call), strict=True
    ):
        if op.tolerance and want.is_floating_point():
            known = want.isfinite()
            rows = got[known][:, None], want[known][:, None]
            require_close(stage, *rows, SCORE_TOLERANCE)
        else:
            require_equal(stage, got, want)


def check_append(device: str, shape: Shape) -> None:
    """Append tokens with strided K, V and Q; raises CheckError."""
    ours, theirs = small_case(device, shape), small_case(device, shape)
    pages = torch.tensor(ours.free_pages[:8], device=device)
    tokens = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
    tokens = tokens.flatten()
    k, v, q = qkv(len(tokens), shape, device)
    ring = torch.arange(len(tokens), device=device) + ours.slots[0] * WINDOW
    ring[WINDOW:] = -1
    append_kv(ours.arena, k, v, q, tokens, ours.query_ring, ring, layer=1)
    append_kv_ref(theirs.arena, k, v, q, tokens, theirs.query_ring, ring, layer=1)
    for mine, reference in zip(ours.arena.cells, theirs.arena.cells, strict=True):
        require_equal("append_kv", mine, reference)
    for mine, reference in zip(ours.query_ring[:2], theirs.query_ring[:2], strict=True):
        require_equal("append_kv", mine, reference)


def qkv(
    tokens: int, shape: Shape, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, q of new tokens: slices of one projection, as a model makes them."""
    heads = [shape.qo_heads, shape.kv_heads, shape.kv_heads]
    size = (tokens, sum(heads), shape.head_dim)
    fused = torch.randn(size, device=device).bfloat16()
    q, k, v = fused.split(heads, dim=1)
    return k, v, q
