"""Time the copies of a snapshot to host memory and back."""

from __future__ import annotations

import torch

from bench.kernels.batches import Shape
from bench.kernels.timing import Clock, Report, require_equal
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.memory.host_pages import HostPages
from sglang_kvc.sessions.host import Copy

SECTION = "host"
TOKENS = 2752
"""A conversation of 11,000 tokens at rate 4."""


def bench_host(
    arena: Arena, shape: Shape, clock: Clock, report: Report, quick: bool
) -> None:
    """Check that pages come back as they were, then time both ways."""
    del shape, quick
    pages, count = arena.k.shape[0], TOKENS // PAGE_SIZE
    host = HostPages(arena, 2 * count / (pages - 1))
    page = torch.randperm(pages - 1, device=arena.k.device)[:count] + 1
    within = torch.arange(PAGE_SIZE, device=page.device)
    tokens = (page[:, None] * PAGE_SIZE + within).flatten()
    slots = list(range(count))
    there, back = (Copy(slots, tokens, to_host) for to_host in (True, False))
    with report.guard("host copies"):
        before = [part[page].clone() for part in arena.cells]
        host.copy_all([there])
        for part in arena.cells:
            part[page] = 0
        host.copy_all([back])
        for part, then in zip(arena.cells, before, strict=True):
            require_equal("pages from host memory", part[page], then)
        size = sum(part.nbytes for part in before)
        for name, copy in (("to_host", there), ("from_host", back)):
            timing = clock.eager(lambda copy=copy: host.copy_all([copy]))
            host_us = clock.host(lambda copy=copy: host.copy_all([copy]))
            report.add(
                SECTION,
                name,
                f"{TOKENS} tokens",
                timing,
                host_us=round(host_us),
                link_gb_s=round(size / timing.us / 1e3, 1),
            )
