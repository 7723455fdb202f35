"""Small batches on which a kernel must match its reference before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import CheckError, require_close, require_equal
from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.eviction.runner import pooling
from sglang_kvc.kernels.append import append_kv, append_kv_ref
from sglang_kvc.kernels.distinct import add_distinct, add_distinct_ref
from sglang_kvc.kernels.key_similarity import key_similarity_scores
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.observe import observe_scores, observe_scores_ref
from sglang_kvc.kernels.pack import (
    commit_tables,
    commit_tables_ref,
    pack_entries,
    pack_entries_ref,
)
from sglang_kvc.kernels.pool import pool_scores, pool_scores_ref
from sglang_kvc.kernels.select import select_entries, select_entries_ref
from sglang_kvc.kernels.testing import Case, make_case, make_plan

DEFAULTS = KVCompressOptions()
METRIC, WINDOW, SINKS = DEFAULTS.metric, DEFAULTS.window, DEFAULTS.sinks
POOL = pooling(DEFAULTS)
POWER = 2
SCORE_TOLERANCE = 1e-3
PLAIN = "observe, no value norms"
"""The stage ``observe`` of the paper's metric, which leaves values out."""
DISTINCT = "distinct"
"""What ``--kv-compress-distinct`` adds behind ``pool``."""


def small_case(device: str, shape: Shape, *, folded: bool = True) -> Case:
    """First and later passes, partly filled pages; equal at every call.

    Without `folded` all are first passes.

    Layers, heads and the alignment of the tables' rows are those of the batches that
    are timed: Triton compiles nothing twice, and what is checked is what is timed.
    """
    return make_case(
        4,
        shape.layers,
        shape.kv_heads,
        shape.qo_heads // shape.kv_heads,
        shape.head_dim,
        seq_lens=[700, 1275, 848, 2096],
        folds=[0, 0, 768, 2000] if folded else [0] * 4,
        dtype=torch.bfloat16,
        device=device,
        window=WINDOW,
    )


def check_pass(device: str, shape: Shape) -> dict[str, str]:
    """Run every stage and its reference, each on the reference's results so far.

    Returns
    -------
    dict : what is wrong, by stage; empty if nothing is.
    """
    ours, theirs = small_case(device, shape), small_case(device, shape)
    plan, heads = make_plan(ours), ours.arena.heads_per_page
    wrong: dict[str, str] = {}

    def compare(
        stage: str,
        require: Callable[..., object],
        got: torch.Tensor,
        want: torch.Tensor,
        *tolerance: float,
    ) -> None:
        try:
            require(stage, got, want, *tolerance)
        except CheckError as error:
            wrong[stage] = str(error)

    def equal(
        stage: str, got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]
    ) -> None:
        for mine, reference in zip(got, want, strict=True):
            compare(stage, require_equal, mine, reference)

    scoring = (plan, ours.arena.head_dim**-0.5, POWER, WINDOW)
    rings = (ours.query_ring, ours.query_lse), (theirs.query_ring, theirs.query_lse)
    # The shipped metric last: what follows works on its scores.
    for values, stage in ((False, PLAIN), (True, "observe")):
        got = observe_scores(*rings[0], ours.arena, ours.tables, *scoring, values)
        raw = observe_scores_ref(
            *rings[1], theirs.arena, theirs.tables, *scoring, values
        )
        compare(stage, require_close, got[:, None], raw[:, None], SCORE_TOLERANCE)

    got = pool_scores(raw, plan, ours.tables, POOL, heads)
    scores = pool_scores_ref(raw, plan, theirs.tables, POOL, heads)
    compare("pool", require_equal, got, scores)

    unlike = key_similarity_scores(ours.arena, ours.tables, plan)
    units = torch.zeros(len(ours.tables.fold_lens), device=device)
    got, want, rest = scores.clone(), scores.clone(), (plan, ours.tables, 1.0, heads)
    add_distinct(got, unlike, units, *rest)
    add_distinct_ref(want, unlike, units.clone(), *rest)
    compare(DISTINCT, require_close, got[:, None], want[:, None], SCORE_TOLERANCE)

    chosen = select_entries(scores, heads, ours.tables, plan, SINKS)
    selected = select_entries_ref(scores, heads, theirs.tables, plan, SINKS)
    equal("select", chosen, selected)
    # Layers share in prompts only here: what the others packed may be too little.
    whole = small_case(device, shape, folded=False)
    plan_whole = make_plan(whole)
    worth = torch.rand(plan_whole.num_entries, device=device)
    where = (worth, heads, whole.tables, plan_whole, SINKS)
    for sharing in ({"groups": shape.layers}, {"bound_groups": shape.layers}):
        chosen = select_entries(*where, **sharing)
        equal("select", chosen, select_entries_ref(*where, **sharing))

    count = plan.num_kept // (PAGE_SIZE * heads)
    pages = torch.tensor(ours.free_pages[:count], device=device)
    pack_entries(ours.arena, selected, pages, plan)
    pack_entries_ref(theirs.arena, selected, pages, plan)
    equal("pack", ours.arena, theirs.arena)

    commit_tables(ours.tables, ours.arena, selected, plan, pages, scores)
    commit_tables_ref(theirs.tables, theirs.arena, selected, plan, pages, scores)
    equal("commit", ours.tables, theirs.tables)
    compare("commit", require_equal, ours.arena.score, theirs.arena.score)
    return wrong


def check_append(device: str, shape: Shape) -> None:
    """Append tokens with strided K, V and Q; raises CheckError."""
    ours, theirs = small_case(device, shape), small_case(device, shape)
    pages = torch.tensor(ours.free_pages[:8], device=device)
    tokens = pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
    tokens = tokens.flatten()
    k, v, q = qkv(len(tokens), shape, device)
    ring = torch.arange(len(tokens), device=device) + ours.slots[0] * WINDOW
    ring[WINDOW:] = -1
    append_kv(k, v, q, ours.arena, 1, tokens, ours.query_ring, ring)
    append_kv_ref(k, v, q, theirs.arena, 1, tokens, theirs.query_ring, ring)
    for mine, reference in zip(ours.arena, theirs.arena, strict=True):
        require_equal("append_kv", mine, reference)
    require_equal("append_kv", ours.query_ring, theirs.query_ring)


def qkv(
    tokens: int, shape: Shape, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k, v, q of new tokens: slices of one projection, as a model makes them."""
    heads = [shape.qo_heads, shape.kv_heads, shape.kv_heads]
    size = (tokens, sum(heads), shape.head_dim)
    fused = torch.randn(size, device=device).bfloat16()
    q, k, v = fused.split(heads, dim=1)
    return k, v, q
