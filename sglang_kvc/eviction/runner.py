"""Run eviction passes on the device: observe, pool, select, pack, commit.

Paper: Algorithm 1 and eq. 6-10, 19-20 (arXiv 2410.00161), in the form of
`kernels/select.py`. Nothing here waits for the device; every size is known to the
host because a pass keeps exactly budget / 16 * L * H blocks.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.scorers import ScoreContext, Scorer, get_scorer
from sglang_kvc.kernels.distinct import add_distinct
from sglang_kvc.kernels.key_similarity import key_similarity_scores
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.pack import commit_tables, pack_entries
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.pool import Pooling, pool_scores
from sglang_kvc.kernels.select import SelectedEntries, select_entries
from sglang_kvc.memory.metadata import (
    ModelShape,
    count_bytes,
    pass_head_bytes,
    pass_workspace_tokens,
    workspace_head_bytes,
)

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions
    from sglang_kvc.memory.device_state import DeviceState
    from sglang_kvc.scheduling.request_state import PassRecord


def run_pass(
    scorer: Scorer,
    context: ScoreContext,
    dest_pages: torch.Tensor,
    *,
    pool: Pooling,
    sinks: int,
    distinct: float = 0.0,
    units: torch.Tensor | None = None,
    groups: int = 1,
    floor_blocks: int = 0,
    bound_groups: int = 0,
) -> SelectedEntries:
    """Score, pool, select, pack and commit the requests of ``context.plan``.

    Parameters
    ----------
    scorer : which KVs are worth keeping.
    context : what it looks at; arena and tables are written.
    dest_pages : [pages kept] int64, fresh pages for the survivors in plan order.
    pool : as in `pool_scores`.
    sinks, distinct : as in `KVCompressOptions`.
    units : of `add_distinct`, with `distinct`.
    groups, floor_blocks, bound_groups : as in `select_entries`.

    Returns
    -------
    SelectedEntries : the survivors.
    """
    arena, tables, plan = context.arena, context.tables, context.plan
    heads = arena.heads_per_page
    scores = scorer.score(context)
    if scorer.pooled:
        scores = pool_scores(scores, plan, tables, pool, heads)
    if distinct:
        assert units is not None
        reward_distinct(scores, context, units, distinct)
    selected = select_entries(
        scores, heads, tables, plan, sinks, groups, floor_blocks, bound_groups
    )
    pack_entries(arena, selected, dest_pages, plan)
    commit_tables(tables, arena, selected, plan, dest_pages, scores)
    return selected


def reward_distinct(
    scores: torch.Tensor, context: ScoreContext, units: torch.Tensor, weight: float
) -> None:
    """`add_distinct` in place, with the keys' unlikeness where the plan needs it."""
    arena, tables, plan = context.arena, context.tables, context.plan
    unlike = key_similarity_scores(arena, tables, plan) if plan.any_pooled else None
    add_distinct(scores, unlike, units, plan, tables, weight, arena.heads_per_page)


def pooling(options: KVCompressOptions) -> Pooling:
    """How scores of a prompt spread, as `pool_scores` wants it."""
    return Pooling(
        options.pool_back, options.pool_ahead, options.pool_decay, options.pool_gain
    )


class Sharing(NamedTuple):
    """Who competes in a pass, as `select_entries` wants it."""

    groups: int
    bound_groups: int = 0


def sharing_of(
    options: KVCompressOptions, shape: ModelShape, *, prompt: bool
) -> Sharing:
    """Who competes in the pass behind a complete `prompt`, or in a later one."""
    if not options.layer_share:
        return Sharing(shape.num_groups(options.allocation))
    layers = shape.num_groups("layer")
    # Layers hold equally much until a prompt is complete, not afterwards.
    return Sharing(1, layers) if prompt else Sharing(layers)


def least_pages(options: KVCompressOptions, kept_pages: int) -> int:
    """Pages that a layer keeps at least where an equal share is `kept_pages`."""
    # A layer must be able to keep what its heads must.
    return max(int(options.layer_share * kept_pages), options.floor // PAGE_SIZE)


WARM_UP_TOKENS = (20 * PAGE_SIZE, 512 * PAGE_SIZE)
"""Prompts of the passes that compile kernels: a short one and one that splits its keys,
and whose heads are scanned in long blocks.
"""


class PassRunner:
    """Launches the passes of a step on the current (forward) stream."""

    def __init__(self, state: DeviceState, sm_scale: float) -> None:
        self.state = state
        self.sm_scale = sm_scale
        self.scorer = get_scorer(state.options.metric)
        options, shape = state.options, state.shape
        self.prompt_sharing = sharing_of(options, shape, prompt=True)
        self.later_sharing = sharing_of(options, shape, prompt=False)
        self.chunk_sharing = Sharing(shape.num_groups(options.chunk_allocation))
        if state.arena.score.numel() >= 1 << 31:
            raise ConfigError(
                "the arena holds 2**31 KVs or more per layer and head in total, which "
                "the kept list (int32) cannot address; lower --max-total-tokens"
            )
        context = state.tables.req_to_token.shape[1]
        pool_tokens = state.arena.k.shape[0] * PAGE_SIZE
        self.max_tokens = pass_workspace_tokens(context, pool_tokens)
        self.max_bytes = workspace_head_bytes(
            state.shape, state.options, context, pool_tokens
        )
        self.counts = count_bytes(state.shape, state.options)

    def run(self, records: list[PassRecord]) -> None:
        """Run every pass of a step; alike ones that fit together share a launch."""
        group: list[PassRecord] = []
        held = 0
        for record in sorted(records, key=self._sharing):
            need = self._head_bytes(record)
            if group and (
                held + need > self.max_bytes
                or self._sharing(record) != self._sharing(group[0])
            ):
                self._run_group(group)
                group, held = [], 0
            group.append(record)
            held += need
        if group:
            self._run_group(group)

    def _sharing(self, record: PassRecord) -> Sharing:
        if record.between_chunks:
            return self.chunk_sharing
        return self.prompt_sharing if record.pool_tail else self.later_sharing

    def _head_bytes(self, record: PassRecord) -> int:
        """Workspace of a pass, bytes per head on average."""
        tail = record.seq_len - record.fold_old
        entries = record.budget_old + -(-tail // PAGE_SIZE) * PAGE_SIZE
        return pass_head_bytes(
            entries, record.budget, self.counts, pooled=record.pool_tail
        )

    def warm_up(self, *, chunks: bool) -> None:
        """Compile every kernel of a pass, on the padding slot and the padding page.

        Whatever the pass leaves there is reset; nobody reads the padding page.
        """
        heads = self.state.arena.heads_per_page
        pages = torch.zeros(1, dtype=torch.int64, device=self.state.device)
        # Passes between chunks take kernels of their own.
        kinds = {self.prompt_sharing, self.later_sharing}
        if chunks:
            kinds.add(self.chunk_sharing)
        for tokens, sharing in product(WARM_UP_TOKENS, sorted(kinds)):
            length = min(tokens, self.max_tokens // (2 * PAGE_SIZE) * PAGE_SIZE)
            evict = (length // PAGE_SIZE - 1) * heads
            request = PassRequest(
                slot=0,
                seq_len=length,
                fold_old=0,
                fold_new=length,
                query_start=max(length - self.state.options.window, 0),
                packed_pages=0,
                evict_blocks=evict,
                evict_most=evict,
                protected=0,
                is_first=True,
                repeated=False,
                pool_tail=True,
                recorded=False,
            )
            # One page is less than sinks and a floor may take.
            self._launch([request], pages, sharing, sinks=0, floor_blocks=0)
            # The pass has packed the padding slot: it must be empty again, also for
            # the next round, whose workspace is sized for an unpacked request.
            self.state.reset_slots([0])

    def _run_group(self, records: list[PassRecord]) -> None:
        heads = self.state.arena.heads_per_page
        options = self.state.options
        requests = [_plan_request(r, heads, options) for r in records]
        pages = torch.cat([r.target[::PAGE_SIZE] // PAGE_SIZE for r in records])
        selected = self._launch(
            requests,
            pages,
            self._sharing(records[0]),
            sinks=options.sinks,
            floor_blocks=-(-options.head_floor // PAGE_SIZE),
        )
        for record, blocks in zip(records, selected.block_offsets, strict=True):
            if record.state.policy.request.report_heads:
                # The step's result, which is waited for, comes behind this copy.
                record.head_blocks = torch.empty(
                    blocks.shape, dtype=blocks.dtype, pin_memory=self.state.on_gpu
                )
                record.head_blocks.copy_(blocks, non_blocking=True)

    def _launch(
        self,
        requests: list[PassRequest],
        dest_pages: torch.Tensor,
        sharing: Sharing,
        *,
        sinks: int,
        floor_blocks: int,
    ) -> SelectedEntries:
        state, options = self.state, self.state.options
        context = ScoreContext(
            query_ring=state.query_ring,
            query_lse=state.query_lse,
            arena=state.arena,
            tables=state.tables,
            plan=build_plan(requests, state.arena.heads_per_page, state.device),
            sm_scale=self.sm_scale,
            window=options.window,
        )
        return run_pass(
            self.scorer,
            context,
            dest_pages,
            pool=pooling(options),
            sinks=sinks,
            distinct=options.distinct,
            units=state.distinct_units,
            floor_blocks=floor_blocks,
            **sharing._asdict(),
        )


def _plan_request(
    record: PassRecord, heads: int, options: KVCompressOptions
) -> PassRequest:
    """Host numbers of one pass, in the terms of `layout.PassPlan`."""
    fold_blocks = (record.fold_new - record.fold_old) // PAGE_SIZE
    freed_pages = (record.budget_old - record.budget) // PAGE_SIZE + fold_blocks
    kept_pages = record.budget // PAGE_SIZE
    least = least_pages(options, kept_pages)
    return PassRequest(
        slot=record.slot,
        seq_len=record.seq_len,
        fold_old=record.fold_old,
        fold_new=record.fold_new,
        query_start=record.query_start,
        packed_pages=record.budget_old // PAGE_SIZE,
        evict_blocks=freed_pages * heads,
        evict_most=(freed_pages + kept_pages - least) * heads,
        protected=max(record.fold_new - (record.seq_len - options.protected), 0),
        is_first=record.is_first,
        repeated=record.repeated,
        pool_tail=record.pool_tail,
        recorded=record.recorded,
    )
