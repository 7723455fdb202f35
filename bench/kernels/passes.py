"""Time eviction passes: each stage on its own, and all as the runner calls them.

Two figures for each: GPU time of the captured graph, tables restored before every run,
and the time that the host needs to launch it. Nothing in a pass waits for the device,
so the host's time matters only where it is the longer one.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.kernels.batches import Shape
from bench.kernels.checks import WINDOW, check_pass
from bench.kernels.pass_cases import PassCase, pass_batch
from bench.kernels.pass_stages import Stage, Stages
from bench.kernels.timing import CheckError, Clock, Report
from sglang_kvc.kernels.layout import Arena
from sglang_kvc.kernels.testing import random_ring

SECTION = "pass"
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
    for name, reason in wrong.items():
        with report.guard(f"pass {name}"):
            raise CheckError(reason)
    ring = random_ring(SLOTS, WINDOW, shape.qo_heads, arena)
    for case in QUICK_CASES if quick else CASES:
        with report.guard(case.name):
            _bench_case(
                # No name here: its scores must not outlive the case.
                Stages(
                    arena,
                    ring,
                    shape.qo_heads,
                    *pass_batch(case, shape, len(arena.k), device),
                ),
                case.name,
                clock,
                report,
                wrong,
            )


def _bench_case(
    run: Stages, case: str, clock: Clock, report: Report, wrong: Mapping[str, str]
) -> None:
    """Time every stage that is not `wrong`, and the pass if none is."""
    for stage in [*run.shipped(), *run.variants()]:
        if stage.name not in wrong:
            _bench_stage(stage, case, clock, report)
            run.restore()
    if not wrong:
        _bench_whole(run, case, clock, report)


def _bench_stage(stage: Stage, case: str, clock: Clock, report: Report) -> None:
    """Time one stage."""
    timing = clock.gpu(stage.work, stage.before)
    host = clock.host(stage.work, stage.before)
    figures = {figure.name: figure.at(timing.us) for figure in stage.figures}
    fields = {"host_us": round(host, 1), **figures}
    report.add(SECTION, stage.name, case, timing, stage.nbytes, **fields)


def _bench_whole(run: Stages, case: str, clock: Clock, report: Report) -> None:
    """Time a whole pass."""
    timing = clock.gpu(run.whole, run.restore)
    run.restore()
    eager = clock.eager(run.whole_planned, run.restore)
    host = clock.host(run.whole_planned, run.restore)
    run.restore()
    about = {
        "host_us": round(host, 1),
        "gpu_eager_us": round(eager.us, 1),
        "entries": run.plan.num_entries,
        "kept": run.plan.num_kept,
    }
    total = sum(stage.nbytes for stage in run.shipped())
    report.add(SECTION, "whole pass", case, timing, total, **about)
