"""The stages of an eviction pass over one batch, and what each must move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench.kernels.batches import Batch
from bench.kernels.checks import (
    DEFAULTS,
    DISTINCT,
    METRIC,
    PLAIN,
    POOL,
    POWER,
    SINKS,
    WINDOW,
)
from bench.kernels.timing import Work
from sglang_kvc.eviction.runner import (
    PassSettings,
    reward_novelty,
    rule_of,
    run_pass,
)
from sglang_kvc.eviction.scorers import ScoreContext, get_scorer
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, PassPlan
from sglang_kvc.kernels.pack import commit_tables, pack_entries
from sglang_kvc.kernels.pass_plan import PassRequest, build_plan
from sglang_kvc.kernels.pool import pool_scores
from sglang_kvc.kernels.query_ring import QueryRing
from sglang_kvc.kernels.select import SelectionRule, select_entries
from sglang_kvc.memory.metadata import ModelShape

SCORER = get_scorer(METRIC)


class Figure(NamedTuple):
    """A column beside a time: `amount` of one call, in 10**12 a second."""

    name: str
    amount: float
    digits: int

    def at(self, us: float) -> float:
        """Its value if a call takes `us` microseconds."""
        return round(self.amount / us / 1e6, self.digits)


class Stage(NamedTuple):
    """One part of a pass that is timed.

    Attributes
    ----------
    name : as the results call it.
    work : runs it.
    nbytes : least bytes that it must move; 0: no such floor.
    figures : further columns of its record.
    before : run before each of its runs, outside the time.
    """

    name: str
    work: Work
    nbytes: int = 0
    figures: tuple[Figure, ...] = ()
    before: Work | None = None


class Stages:
    """The stages over one batch, as shipped, each on the results of the one before.

    Parameters
    ----------
    arena, ring : KVs and queries, of any request.
    num_heads : query heads of a layer.
    batch, requests : of a case, see `pass_batch`.
    """

    def __init__(
        self,
        arena: Arena,
        ring: QueryRing,
        num_heads: int,
        batch: Batch,
        requests: Sequence[PassRequest],
    ) -> None:
        self.arena, self.requests = arena, requests
        plan = self._plan()
        shape = ModelShape(
            *arena.k.shape[1:3],
            num_heads,
            arena.head_dim,
            arena.k.element_size(),
            arena.k.element_size(),
        )
        self.row_bytes = arena.head_dim * arena.k.element_size()
        self.rule = rule_of(DEFAULTS, shape, prompt=plan.any_pooled)
        self.tables, self.plan = batch.tables, plan
        self.saved = [table.clone() for table in self.tables[1:]]
        self.pages = batch.free_pages[
            : plan.num_kept // (PAGE_SIZE * arena.heads_per_page)
        ]
        self.context = ScoreContext(
            query_ring=ring,
            arena=arena,
            tables=batch.tables,
            plan=plan,
            group=shape.group,
            sm_scale=arena.head_dim**-0.5,
        )
        self.raw = self.observe()
        self.novelty_unit = torch.zeros(
            len(batch.tables.fold_lens), device=arena.k.device
        )
        self.scores = self.pool()
        reward_novelty(
            self.context,
            self.scores,
            self.novelty_unit,
            weight=DEFAULTS.distinct_weight,
        )
        self.selected = self.select()

    def restore(self) -> None:
        """Undo `commit_tables`: another pass finds the tables as they were."""
        for table, saved in zip(self.tables[1:], self.saved, strict=True):
            table.copy_(saved)

    def observe(self) -> torch.Tensor:
        """Score all resident KVs."""
        return SCORER.score(self.context)

    def observe_plain(self) -> torch.Tensor:
        """Score all resident KVs without the length of their values."""
        return self.context.attention(POWER)

    def pool(self) -> torch.Tensor:
        """Spread the scores of a first pass."""
        return pool_scores(self.tables, self.plan, self.raw, pooling=POOL)

    def distinct(self) -> None:
        """Add what keys say to the raw scores, which nothing after this reads."""
        reward_novelty(
            self.context, self.raw, self.novelty_unit, weight=DEFAULTS.distinct_weight
        )

    def select_joint(self) -> Any:
        """Choose the survivors as if layers had no share of their own."""
        rule = SelectionRule(SINKS)
        return select_entries(self.tables, self.plan, self.scores, rule=rule)

    def select(self) -> Any:
        """Choose the survivors."""
        return select_entries(self.tables, self.plan, self.scores, rule=self.rule)

    def pack(self) -> None:
        """Move the survivors to their pages."""
        pack_entries(self.arena, self.plan, self.selected, self.pages)

    def commit(self) -> None:
        """Publish the survivors in the tables."""
        rest = (self.plan, self.selected, self.pages, self.scores)
        commit_tables(self.arena, self.tables, *rest)

    def whole(self) -> None:
        """Run a pass, as `PassRunner` composes it."""
        self._run(self.plan)

    def whole_planned(self) -> None:
        """Run a pass and make its plan."""
        self._run(self._plan())

    def _plan(self) -> PassPlan:
        return build_plan(self.requests, self.arena.heads_per_page, self.arena.k.device)

    def _run(self, plan: PassPlan) -> None:
        context = replace(self.context, plan=plan)
        settings = PassSettings.of(DEFAULTS, self.rule)
        run_pass(SCORER, context, self.pages, self.novelty_unit, settings)

    def shipped(self) -> list[Stage]:
        """The stages that a pass consists of, in their order."""
        arena, plan, row_bytes = self.arena, self.plan, self.row_bytes
        entries, kept, first = plan.num_entries, plan.num_kept, plan.any_pooled
        # The products of a query with a key: for log-sum-exps, and for the scores.
        flops = 2 * 2 * WINDOW * self.context.group * arena.head_dim * entries
        # Row index and score come with a survivor; K, V and score go out.
        read, written = kept * (2 * row_bytes + 8), kept * (2 * row_bytes + 4)
        tflops = Figure("tflops", flops, digits=1)
        one_way = Figure("one_way_tb_s", written, digits=3)
        return [
            # Every key and value once, every score out.
            Stage("observe", self.observe, entries * (2 * row_bytes + 4), (tflops,)),
            Stage("pool", self.pool, entries * 8 if first else 0),
            # Keys are read twice, of a prompt only.
            Stage(DISTINCT, self.distinct, entries * 2 * row_bytes if first else 0),
            Stage("select", self.select, entries * 4 + kept * 8),
            Stage("pack", self.pack, read + written, (one_way,)),
            # It publishes other tables than those that it reads.
            Stage("commit", self.commit, before=self.restore),
        ]

    def variants(self) -> list[Stage]:
        """Stages with other settings, or of other requests, than a pass has."""
        return [
            # Keys alone.
            Stage(
                PLAIN, self.observe_plain, self.plan.num_entries * (self.row_bytes + 4)
            ),
            Stage("select, joint", self.select_joint),
        ]
