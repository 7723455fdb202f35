"""Run eviction passes on the device: observe, pool, select, pack, commit.

Paper: Algorithm 1 and eq. 6-10, 19-20 (arXiv 2410.00161), in the form of
`kernels/select.py`. Nothing here waits for the device; every size is known to the
host because a pass keeps exactly budget / 16 * L * H blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import torch

from sglang_kvc.config.pages import ceil_tokens, pages_of
from sglang_kvc.errors import ConfigError
from sglang_kvc.eviction.reports import report, warm_up_positions
from sglang_kvc.eviction.scorers import ScoreContext, Scorer, get_scorer
from sglang_kvc.kernels.key_diff import key_diff
from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.kernels.novelty import add_novelty
from sglang_kvc.kernels.pack import commit_tables, pack_entries
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.pool import Pooling, pool_scores
from sglang_kvc.kernels.select import (
    SelectedEntries,
    SelectionRule,
    select_entries,
)
from sglang_kvc.memory.metadata import (
    ModelShape,
    count_bytes,
    lse_bytes,
    pass_head_bytes,
    pass_workspace_tokens,
    workspace_head_bytes,
)

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions
    from sglang_kvc.memory.device_state import DeviceState
    from sglang_kvc.scheduling.pass_decision import PassDecision
    from sglang_kvc.scheduling.request_state import PassInFlight


@dataclass(frozen=True)
class PassSettings:
    """Settings of a pass: what it does with scores, the same for all its requests.

    Attributes
    ----------
    rule : who competes, as in `select_entries`.
    pooling : how scores of a prompt spread, as in `pool_scores`.
    novelty : weight of what keys say, as in `add_novelty`; 0: nothing.
    aging : what is left of scores at the next pass.
    """

    rule: SelectionRule
    pooling: Pooling
    novelty: float = 0.0
    aging: float = 1.0

    @classmethod
    def of(
        cls, options: KVCompressOptions, rule: SelectionRule, *, ages: bool = True
    ) -> PassSettings:
        """Make the settings of a server; scores of a pass that `ages` fade after it."""
        aging = options.aging if ages else 1.0
        return cls(rule, pooling(options), options.distinct_weight, aging)


def run_pass(
    scorer: Scorer,
    context: ScoreContext,
    dest_pages: torch.Tensor,
    novelty_unit: torch.Tensor,
    settings: PassSettings,
) -> SelectedEntries:
    """Score, pool, select, pack and commit the requests of ``context.plan``.

    Parameters
    ----------
    scorer : which KVs are worth keeping.
    context : what it looks at; arena and tables are written.
    dest_pages : [pages kept] int64, fresh pages for the survivors in plan order.
    novelty_unit : [slots] fp32 of `add_novelty`; untouched if ``settings.novelty``
        is 0.
    settings : see `PassSettings`.

    Returns
    -------
    SelectedEntries : the survivors.
    """
    arena, tables, plan = context.arena, context.tables, context.plan
    scores = scorer.score(context)
    if scorer.pooled:
        scores = pool_scores(tables, plan, scores, pooling=settings.pooling)
    if settings.novelty:
        reward_novelty(context, scores, novelty_unit, weight=settings.novelty)
    selected = select_entries(tables, plan, scores, rule=settings.rule)
    if settings.aging != 1:
        # What is stored is what the next pass adds to.
        for stored in (scores, selected.scores):
            stored.mul_(settings.aging)
    pack_entries(arena, plan, selected, dest_pages)
    commit_tables(arena, tables, plan, selected, dest_pages, scores)
    return selected


def reward_novelty(
    context: ScoreContext,
    scores: torch.Tensor,
    novelty_unit: torch.Tensor,
    *,
    weight: float,
) -> None:
    """Run `add_novelty` in place, with the keys' differences if the plan needs it."""
    arena, tables, plan = context.arena, context.tables, context.plan
    diffs = key_diff(arena, tables, plan) if plan.any_pooled else None
    add_novelty(tables, plan, scores, diffs, novelty_unit, weight=weight)


def pooling(options: KVCompressOptions) -> Pooling:
    """Make a `Pooling` of the options: how the scores of a prompt spread."""
    return Pooling(
        back=options.pool_back,
        ahead=options.pool_ahead,
        decay=options.pool_decay,
        gain=options.pool_gain,
    )


def rule_of(
    options: KVCompressOptions, shape: ModelShape, *, prompt: bool
) -> SelectionRule:
    """Rule of the pass behind a complete `prompt`, or of a later one: who competes."""
    if not options.least_layer_share:
        return _by_groups(options, shape.num_groups(options.allocation))
    layers = shape.num_groups("layer")
    # Layers hold equally much until a prompt is complete, not afterwards.
    if prompt:
        return _by_groups(options, 1, bound_groups=layers)
    return _by_groups(options, layers)


def _by_groups(
    options: KVCompressOptions, groups: int, *, bound_groups: int = 0
) -> SelectionRule:
    return SelectionRule(
        sinks=options.sinks,
        groups=groups,
        floor_blocks=pages_of(options.head_floor),
        bound_groups=bound_groups,
    )


def least_pages(options: KVCompressOptions, kept_pages: int, protected: int) -> int:
    """Pages that a layer keeps at least where an equal share is `kept_pages`.

    `protected`: last tokens below the fold that every head keeps.
    """
    # A layer must be able to keep what its heads must.
    forced = max(pages_of(options.sinks + protected), options.floor // PAGE_SIZE)
    return max(int(options.least_layer_share * kept_pages), forced)


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
        self.prompt_rule = rule_of(options, shape, prompt=True)
        self.later_rule = rule_of(options, shape, prompt=False)
        self.chunk_rule = _by_groups(
            options, shape.num_groups(options.chunk_allocation)
        )
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
        self.lse = lse_bytes(state.shape, state.options)

    def run(self, launched: list[PassInFlight]) -> None:
        """Run every pass of a step; alike ones that fit together share a launch."""
        group: list[PassInFlight] = []
        held = 0
        for one in sorted(launched, key=lambda it: self._kind(it.decision)):
            need = self._head_bytes(one.decision)
            if group and (
                held + need > self.max_bytes
                or self._kind(one.decision) != self._kind(group[0].decision)
            ):
                self._run_group(group)
                group, held = [], 0
            group.append(one)
            held += need
        if group:
            self._run_group(group)

    def _kind(self, decision: PassDecision) -> tuple[SelectionRule, bool]:
        """What passes have in common that share a launch: the rule, and if they age.

        Passes between chunks are scored by the same queries again, so none is older.
        """
        return self._rule(decision), not decision.between_chunks

    def _rule(self, decision: PassDecision) -> SelectionRule:
        if decision.between_chunks:
            return self.chunk_rule
        level = decision.pool_tail and decision.level
        return self.prompt_rule if level else self.later_rule

    def _head_bytes(self, decision: PassDecision) -> int:
        """Workspace of a pass, bytes per head on average."""
        tail = decision.seq_len - decision.fold_old
        entries = decision.packed_old + ceil_tokens(tail)
        return pass_head_bytes(
            entries,
            decision.packed_new,
            counts=self.counts,
            lse=self.lse,
            pooled=decision.pool_tail,
        )

    def warm_up(self, *, chunks: bool) -> None:
        """Compile every kernel of a pass, on the padding slot and the padding page.

        Whatever the pass leaves there is reset; nobody reads the padding page.
        """
        pages = torch.zeros(1, dtype=torch.int64, device=self.state.device)
        # Passes between chunks take kernels of their own.
        kinds = {self.prompt_rule, self.later_rule}
        if chunks:
            kinds.add(self.chunk_rule)
        for tokens, rule in product(WARM_UP_TOKENS, sorted(kinds)):
            length = min(tokens, self.max_tokens // (2 * PAGE_SIZE) * PAGE_SIZE)
            evict = length // PAGE_SIZE - 1
            request = PassRequest(
                slot=0,
                seq_len=length,
                fold_old=0,
                fold_new=length,
                query_start=max(length - self.state.options.window, 0),
                packed_pages=0,
                evict_pages=evict,
                evict_most_pages=evict,
                protected=0,
                is_first=True,
                repeated=False,
                pool_tail=True,
            )
            # One page is less than sinks and a floor may take.
            kept = self._launch(
                [request], pages, replace(rule, sinks=0, floor_blocks=0)
            )
            warm_up_positions(self.state, kept.source_rows)
            # The pass has packed the padding slot: it must be empty again, also for
            # the next round, whose workspace is sized for an unpacked request.
            self.state.reset_slots([0])

    def _run_group(self, group: list[PassInFlight]) -> None:
        requests = [_plan_request(it.decision, self.state.options) for it in group]
        pages = torch.cat([it.dest_tokens[::PAGE_SIZE] // PAGE_SIZE for it in group])
        rule, ages = self._kind(group[0].decision)
        selected = self._launch(requests, pages, rule, ages=ages)
        if self.state.options.sessions:
            self._note_tables(group, selected)
        report(self.state, group, selected, pages)

    def _note_tables(
        self, group: list[PassInFlight], selected: SelectedEntries
    ) -> None:
        """Keep what a snapshot needs of a slot's tables: the next pass replaces it."""
        slots = self.state.to_device([it.decision.slot for it in group])
        units = self.state.novelty_unit.index_select(0, slots)
        for row, launched in enumerate(group):
            launched.offsets = selected.block_offsets[row]
            launched.unit = units[row]

    def _launch(
        self,
        requests: list[PassRequest],
        dest_pages: torch.Tensor,
        rule: SelectionRule,
        *,
        ages: bool = True,
    ) -> SelectedEntries:
        state = self.state
        context = ScoreContext(
            query_ring=state.query_ring,
            arena=state.arena,
            tables=state.tables,
            plan=build_plan(requests, state.arena.heads_per_page, state.device),
            group=state.shape.group,
            sm_scale=self.sm_scale,
        )
        settings = PassSettings.of(state.options, rule, ages=ages)
        return run_pass(self.scorer, context, dest_pages, state.novelty_unit, settings)


def _plan_request(decision: PassDecision, options: KVCompressOptions) -> PassRequest:
    """Translate one pass into host numbers in the terms of the kernels."""
    fold_blocks = (decision.fold_new - decision.fold_old) // PAGE_SIZE
    freed_pages = (decision.packed_old - decision.packed_new) // PAGE_SIZE + fold_blocks
    kept_pages = decision.packed_new // PAGE_SIZE
    protected = max(decision.fold_new - (decision.seq_len - decision.protected), 0)
    least = least_pages(options, kept_pages, protected)
    return PassRequest(
        slot=decision.slot,
        seq_len=decision.seq_len,
        fold_old=decision.fold_old,
        fold_new=decision.fold_new,
        query_start=decision.query_start,
        packed_pages=decision.packed_old // PAGE_SIZE,
        evict_pages=freed_pages,
        evict_most_pages=freed_pages + kept_pages - least,
        protected=protected,
        is_first=decision.is_first,
        repeated=decision.repeated,
        pool_tail=decision.pool_tail,
    )
