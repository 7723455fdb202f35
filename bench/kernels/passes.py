"""An eviction pass: each stage on its own, and all of them as the runner calls them.

Two figures for each: GPU time of the captured graph, tables restored before every run,
and the time that the host needs to launch it. Nothing in a pass waits for the device,
so the host's time matters only where it is the longer one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bench.kernels.batches import Batch, Shape
from bench.kernels.checks import (
    DEFAULTS,
    DISTINCT,
    METRIC,
    PLAIN,
    POOL,
    POWER,
    SINKS,
    WINDOW,
    check_pass,
)
from bench.kernels.pass_cases import PassCase, pass_batch
from bench.kernels.timing import CheckError, Clock, Report
from sglang_kvc.eviction.runner import (
    PassSettings,
    reward_novelty,
    rule_of,
    run_pass,
)
from sglang_kvc.eviction.scorers import ScoreContext, get_scorer
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena, PassPlan
from sglang_kvc.kernels.pack import commit_tables, pack_entries
from sglang_kvc.kernels.pass_plan import build_plan
from sglang_kvc.kernels.pool import pool_scores
from sglang_kvc.kernels.select import SelectionRule, select_entries
from sglang_kvc.memory.metadata import ModelShape

SECTION = "pass"
SCORER = get_scorer(METRIC)
SLOTS = 65
"""Rows of the query ring: the padding slot and the most requests of a case."""


CASES = (
    PassCase(1, 0, 6_016),
    PassCase(1, 0, 32_768),
    PassCase(1, 0, 131_072),
    PassCase(1, 752, 80),
    PassCase(64, 752, 80),
    PassCase(16, 4_096, 80),
)
QUICK_CASES = (CASES[0], CASES[4])
ARENA_PAGES = max(case.pages for case in CASES) + 64


class Stages:
    """The stages over one batch, as shipped, each on the results of the one before."""

    def __init__(
        self, arena: Arena, ring: torch.Tensor, batch: Batch, plan: PassPlan
    ) -> None:
        self.arena = arena
        shape = ModelShape(
            *arena.k.shape[1:3], ring.shape[-2], arena.head_dim, arena.k.element_size()
        )
        self.rule = rule_of(DEFAULTS, shape, prompt=plan.any_pooled)
        self.tables, self.plan = batch.tables, plan
        self.saved = [table.clone() for table in self.tables[1:]]
        self.pages = batch.free_pages[
            : plan.num_kept // (PAGE_SIZE * arena.heads_per_page)
        ]
        self.context = ScoreContext(
            query_ring=ring,
            query_lse=torch.zeros(ring.shape[:-1], device=ring.device),
            arena=arena,
            tables=batch.tables,
            plan=plan,
            sm_scale=arena.head_dim**-0.5,
        )
        self.observe_unrecorded()
        self.raw = self.observe()
        self.novelty_unit = torch.zeros(len(batch.tables.fold_lens), device=ring.device)
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
        """Scores of all resident KVs."""
        return SCORER.score(self.context)

    def observe_plain(self) -> torch.Tensor:
        """The same, without the length of the values."""
        return self.context.attention(POWER)

    def observe_unrecorded(self) -> torch.Tensor:
        """The same, when no log-sum-exp is known; leaves them in the ring."""
        nothing = torch.zeros_like(self.plan.recorded)
        plan = self.plan._replace(recorded=nothing, all_recorded=False)
        return SCORER.score(replace(self.context, plan=plan))

    def pool(self) -> torch.Tensor:
        """Scores, smoothed in a first pass."""
        return pool_scores(self.tables, self.plan, self.raw, pooling=POOL)

    def distinct(self) -> None:
        """What keys say, added to raw scores, which nothing after this reads."""
        reward_novelty(
            self.context, self.raw, self.novelty_unit, weight=DEFAULTS.distinct_weight
        )

    def select_joint(self) -> Any:
        """The survivors, if layers had no share of their own."""
        rule = SelectionRule(SINKS)
        return select_entries(self.tables, self.plan, self.scores, rule=rule)

    def select(self) -> Any:
        """The survivors."""
        return select_entries(self.tables, self.plan, self.scores, rule=self.rule)

    def pack(self) -> None:
        """Move them."""
        pack_entries(self.arena, self.plan, self.selected, self.pages)

    def commit(self) -> None:
        """Publish them."""
        rest = (self.plan, self.selected, self.pages, self.scores)
        commit_tables(self.arena, self.tables, *rest)

    def whole(self, plan: PassPlan) -> None:
        """One pass, as `PassRunner` composes it."""
        context = replace(self.context, plan=plan)
        settings = PassSettings.of(DEFAULTS, self.rule)
        run_pass(SCORER, context, self.pages, self.novelty_unit, settings)


def bench_pass(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool
) -> None:
    """Check the stages, then time the cases."""
    device = str(arena.k.device)
    wrong: dict[str, str] | None = None
    with report.guard("pass check"):
        wrong = check_pass(device, shape)
    if wrong is None:
        return
    for stage, reason in wrong.items():
        with report.guard(f"pass {stage}"):
            raise CheckError(reason)
    size = (SLOTS, shape.layers, WINDOW, shape.qo_heads, shape.head_dim)
    ring = torch.empty(size, dtype=arena.k.dtype, device=device).normal_()
    for case in QUICK_CASES if quick else CASES:
        with report.guard(case.name):
            _bench_case(case, arena, ring, shape, clock, report, wrong)


def _bench_case(
    case: PassCase,
    arena: Arena,
    ring: torch.Tensor,
    shape: Shape,
    clock: Clock,
    report: Report,
    wrong: dict[str, str],
) -> None:
    """All figures of one case."""
    batch, requests = pass_batch(case, shape, arena.k.shape[0], str(arena.k.device))
    plan = build_plan(requests, shape.heads_per_page, arena.k.device)
    run = Stages(arena, ring, batch, plan)
    row_bytes = shape.head_dim * arena.k.element_size()
    entries, kept = plan.num_entries, plan.num_kept
    # The products of a query with a key: for the scores, and for log-sum-exps that were
    # not recorded.
    rows = WINDOW * shape.qo_heads // shape.kv_heads
    flops = 2 * rows * shape.head_dim * entries * (1 if case.packed else 2)
    # Row index and score come with a survivor; K, V and score go out.
    read, written = kept * (2 * row_bytes + 8), kept * (2 * row_bytes + 4)
    stages = {
        # Every key and value once, every score out.
        "observe": (run.observe, entries * (2 * row_bytes + 4)),
        "pool": (run.pool, 0 if case.packed else entries * 8),
        # Keys are read twice, of a prompt only.
        DISTINCT: (run.distinct, 0 if case.packed else entries * 2 * row_bytes),
        "select": (run.select, entries * 4 + kept * 8),
        "pack": (run.pack, read + written),
        "commit": (run.commit, 0),
    }
    total = sum(nbytes for _, nbytes in stages.values())
    others = {
        PLAIN: (run.observe_plain, entries * (row_bytes + 4)),
        "select, joint": (run.select_joint, 0),
    }
    if case.packed:
        others["observe, none recorded"] = (run.observe_unrecorded, 0)
    for stage, (work, nbytes) in {**stages, **others}.items():
        if stage in wrong:
            continue
        # `commit` publishes other tables than those that it reads.
        before = run.restore if stage == "commit" else None
        timing = clock.gpu(work, before)
        fields: dict[str, Any] = {"host_us": round(clock.host(work, before), 1)}
        if stage == "observe":
            fields["tflops"] = round(flops / timing.us / 1e6, 1)
        if stage == "pack":
            fields["one_way_tb_s"] = round(written / timing.us / 1e6, 3)
        report.add(SECTION, stage, case.name, timing, nbytes, **fields)
        run.restore()
    if wrong:
        return

    def whole() -> None:
        run.whole(plan)

    def launched() -> None:
        run.whole(build_plan(requests, shape.heads_per_page, arena.k.device))

    timing = clock.gpu(whole, run.restore)
    run.restore()
    eager = clock.eager(launched, run.restore)
    host = clock.host(launched, run.restore)
    run.restore()
    about = {
        "host_us": round(host, 1),
        "gpu_eager_us": round(eager.us, 1),
        "entries": entries,
        "kept": kept,
    }
    report.add(SECTION, "whole pass", case.name, timing, total, **about)
