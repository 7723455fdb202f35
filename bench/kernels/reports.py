"""Time what `report_tokens` adds to passes: 32 requests of 8,192 tokens at rate 8.

One launch is the case: every request passes and asks. In a server each does so once an
interval, so the cost of a step is that of the launch by the interval's steps, however
the passes lie. It is timed eagerly, as it is served: behind a pass, on its stream, with
the copies to the host.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bench.kernels.batches import Batch, Shape
from bench.kernels.checks import DEFAULTS, WINDOW
from bench.kernels.pass_cases import PassCase, pass_batch
from bench.kernels.pass_stages import Stages
from bench.kernels.timing import Clock, Report, require_equal
from sglang_kvc.eviction import reports
from sglang_kvc.kernels.dispatch import FORCE_REFERENCE
from sglang_kvc.kernels.held import KeptPositions
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.kernels.testing import random_ring

SECTION = "report"
CASES = (
    PassCase(1, 1_024, 80),
    PassCase(32, 1_024, 80),
    PassCase(32, 0, 8_192),
)
QUICK_CASES = CASES[:2]
ARENA_PAGES = max(case.pages for case in CASES) + 64


class Asking:
    """Passes of a case whose requests ask for reports.

    Parameters
    ----------
    run : the stages, whose survivors are reported.
    batch : of the same case.
    """

    def __init__(self, run: Stages, batch: Batch) -> None:
        device = run.arena.k.device
        self.run, self.selected = run, run.selected
        self.state: Any = SimpleNamespace(
            arena=run.arena,
            tables=run.tables,
            shape=SimpleNamespace(num_layers=run.arena.num_layers),
            on_gpu=device.type == "cuda",
        )
        self.known: list[KeptPositions | None] = []
        self.group: list[Any] = []
        heads = run.arena.heads_per_page
        for it, packed in zip(run.requests, batch.packed_pages, strict=True):
            kept = (it.packed_pages - it.evict_pages) * PAGE_SIZE + it.fold_new
            kept -= it.fold_old
            before = None
            if packed:
                own = run.tables.packed_pages[it.slot, :packed].long()
                size = (packed * PAGE_SIZE * heads,)
                where = torch.randint(it.fold_old, size, device=device)
                before = KeptPositions(own, where.int())
            self.known.append(before)
            self.group.append(_launched(it, kept))

    def ask(self, tokens: bool) -> None:
        """Whether the requests want `report_tokens`."""
        for launched in self.group:
            launched.state.policy.request.report_tokens = tokens

    def restore(self) -> None:
        """Positions and tables as they were before the pass."""
        self.run.restore()
        for launched, known in zip(self.group, self.known, strict=True):
            launched.state.positions = known

    def report(self) -> None:
        """What the runner does behind a pass."""
        reports.report(self.state, self.group, self.selected, self.run.pages)

    def told(self) -> torch.Tensor:
        """Shares of all requests, once they have arrived."""
        self.restore()
        self.report()
        if self.state.on_gpu:
            torch.cuda.synchronize()
        return torch.stack([launched.token_shares for launched in self.group])


def _launched(it: Any, kept: int) -> Any:
    asked = SimpleNamespace(report_heads=False, report_tokens=True)
    return SimpleNamespace(
        decision=SimpleNamespace(
            packed_new=kept, slot=it.slot, fold_old=it.fold_old, fold_new=it.fold_new
        ),
        state=SimpleNamespace(positions=None, policy=SimpleNamespace(request=asked)),
        req=SimpleNamespace(origin_input_ids=range(it.fold_old or it.fold_new)),
        token_shares=None,
    )


def bench_report(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool
) -> None:
    """Check each case, then time passes that are reported and passes that are not."""
    device = str(arena.k.device)
    slots = max(case.requests for case in CASES) + 1
    ring = random_ring(slots, WINDOW, shape.qo_heads, arena)
    for case in QUICK_CASES if quick else CASES:
        # Without a server nobody knows how many ranks there are.
        one_rank = mock.patch.object(reports, "gather_heads", lambda heads: heads)
        with report.guard(f"report {case.name}"), one_rank:
            batch, requests = pass_batch(case, shape, len(arena.k), device)
            run = Stages(arena, ring, shape.qo_heads, batch, requests)
            _bench_case(Asking(run, batch), case, clock, report)


def _bench_case(asking: Asking, case: PassCase, clock: Clock, report: Report) -> None:
    told = asking.told()
    os.environ[FORCE_REFERENCE] = "1"
    try:
        require_equal("report", told, asking.told())
    finally:
        del os.environ[FORCE_REFERENCE]

    def whole() -> None:
        asking.run.whole_planned()
        asking.report()

    for name, wanted in (("off", False), ("on", True)):
        asking.ask(wanted)
        timing = clock.eager(whole, asking.restore)
        host = clock.host(whole, asking.restore)
        report.add(SECTION, f"pass, {name}", case.name, timing, host_us=round(host, 1))
    timing = clock.eager(asking.report, asking.restore)
    host = clock.host(asking.report, asking.restore)
    slower = max(timing.us, host)
    about = {
        "host_us": round(host, 1),
        "us_a_request": round(slower / case.requests, 2),
        # Every request passes once an interval.
        "us_a_step": round(slower / DEFAULTS.interval, 2),
    }
    report.add(SECTION, "report_tokens", case.name, timing, **about)
    asking.restore()
