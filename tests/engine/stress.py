"""Mixed load on a tiny model and a tiny pool, with every page accounted for.

``python -m tests.engine.stress OUT.json`` runs the scenarios in one process (SGLang
allows one scheduler a process) and writes a report that `test_stress.py` judges.
Every page that is freed is filled with NaN. After every scheduler poll each page must
have exactly one owner, and each row of the tables must say what its owner has packed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang_kvc.memory.host_pages import HostPages
from sglang_kvc.scheduling import passes as scheduling
from sglang_kvc.scheduling import settling
from sglang_kvc.sessions.host import Copy
from sglang_kvc.upstream.generation import UPSTREAM
from tests.engine.inprocess import InProcessScheduler, Request, make_server_args
from tests.engine.shared_pages import SharedPages
from tests.engine.slot_reuse import run_slot_reuse
from tests.engine.tiny_model import FEW_LAYERS, VOCAB, write_tiny_model

# Of this process, not of one that only imports this file: other tests take pages away.
STRICT = "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"
POOL = 1280
PAGE = 16
REQUESTS_PER_LOAD = 38


class Load(NamedTuple):
    """What is switched on while mixed requests are served."""

    overlap: bool
    radix: bool
    retract: bool


LOADS = [
    Load(overlap, radix, retract)
    for overlap in (True, False)
    for radix in (True, False)
    for retract in (False, True)
]


class Served(NamedTuple):
    """What came of a request."""

    ids: list[int]
    deferred: int
    retractions: int

    @property
    def disturbed(self) -> bool:
        """Whether a late pass or a restart saw other queries, by definition."""
        return bool(self.deferred or self.retractions)


def mixed_requests(
    rng: random.Random, count: int, aborts: bool, longs: bool = False
) -> list[Request]:
    """Prompts of 1 to 420 tokens, half with a shared prefix; every kind of option.

    With `longs` some have 700 or 1,500 tokens; the pool has 1,280.
    """
    shared = [rng.randrange(2, VOCAB) for _ in range(300)]
    requests = []
    for i in range(count):
        length = rng.choice([1, 15, 16, 17, 31, 47, 63, 100, 150, 211, 300, 420])
        ids = [rng.randrange(2, VOCAB) for _ in range(length)]
        if rng.random() < 0.5:
            keep = rng.randrange(0, min(length, 300))
            ids[:keep] = shared[:keep]
        kv: dict[str, Any] | None = rng.choice(
            [None, {"rate": 2}, {"rate": 8}, {"budget": 48}, {"budget": 96},
             {"budget": 100_000}, {"enabled": False}]
        )  # fmt: skip
        if longs and i % 6 == 5:
            ids += [rng.randrange(2, VOCAB) for _ in range(rng.choice([700, 1500]))]
        arrive = rng.randrange(0, 3 * count)
        stop = list(range(VOCAB)) if rng.random() < 0.1 else []
        requests.append(
            Request(
                # SGLang aborts by prefix: no name may begin with another.
                f"r{i:03}",
                ids,
                max_new=rng.choice([1, 1, 2, 3, 20, 60, 110]),
                kv=kv,
                arrive=arrive,
                stop=stop,
                # Whoever ignores EOS ignores stops.
                ignore_eos=not stop,
                abort_at=arrive + rng.randrange(0, 60)
                if aborts and rng.random() < 0.3
                else None,
            )
        )
    return requests


class PageAudit:
    """Poison freed pages and check that every page has one owner.

    Those of the prefix tree belong to many, and nobody may write them: `shared`.
    """

    def __init__(self, scheduler: InProcessScheduler) -> None:
        self.scheduler = scheduler
        self.allocator = scheduler.allocator
        self.pool = self.allocator.get_kvcache()
        self.audits = 0
        release = self.allocator._release_page_ids

        def poison(*page_ids: torch.Tensor) -> None:
            self._copy_snapshots()
            for ids in page_ids:
                self.pool.arena.k[ids.long()] = float("nan")
                self.pool.arena.v[ids.long()] = float("nan")
                self.pool.arena.score[ids.long()] = float("nan")
            release(*page_ids)

        self.allocator._release_page_ids = poison
        # Behind the poison: what is freed is looked at before.
        tree = scheduler.sch.tree_cache
        self.shared = SharedPages(tree, self.allocator, self.pool.arena)
        copy_all = HostPages.copy_all

        def copied(host: HostPages, copies: list[Copy]) -> None:
            copy_all(host, copies)
            self.shared.written([it.tokens for it in copies if not it.to_host])

        HostPages.copy_all = copied  # type: ignore[method-assign]

    def _copy_snapshots(self) -> None:
        """Make the copies to host memory and back that the next step would."""
        tree, host = self.scheduler.sch.tree_cache, self.pool.runtime.state.host
        if host is not None:
            host.copy_all(tree.take_copies())

    def live_requests(self) -> list[Any]:
        """Requests that own memory now."""
        sch = self.scheduler.sch
        batches = [sch.running_batch, sch.last_batch]
        batches += [batch for batch, _ in getattr(sch, "result_queue", [])]
        reqs = [r for b in batches if b is not None for r in b.reqs]
        if sch.chunked_req is not None:
            reqs.append(sch.chunked_req)
        return list({id(r): r for r in reqs if UPSTREAM.holds_memory(r)}.values())

    def owners(self) -> list[torch.Tensor]:
        """Page ids by owner; together they must be every page once."""
        table = self.scheduler.sch.req_to_token_pool.req_to_token
        lists = [self.allocator.free_pages, self.shared.pages()]
        for req in self.live_requests():
            state = scheduling.state_of(req)
            low = UPSTREAM.protected_len(req)
            if state is not None:
                lists += [it.dest_tokens[::PAGE] // PAGE for it in state.in_flight]
                if state.ring is not None:
                    lists.append(state.ring.token_ids[::PAGE] // PAGE)
                if state.settled_fold:
                    low = state.own_from
                    if state.borrowed is None:
                        lists.append(state.settled_packed[::PAGE] // PAGE)
            row = table[UPSTREAM.slot(req), low : UPSTREAM.allocated_len(req)]
            lists.append(row[::PAGE].long() // PAGE)
        return lists

    def check(self, _now: int) -> None:
        """Raise if a page is lost, shared or owned twice, or a row is not in order."""
        pages = torch.cat(self.owners()).sort().values
        expected = torch.arange(1, self.allocator.size // PAGE + 1)
        if not torch.equal(pages, expected):
            counts = torch.bincount(pages, minlength=len(expected) + 1)
            raise AssertionError(
                f"lost pages {(counts[1:] == 0).nonzero().flatten().tolist()[:8]}, "
                f"owned twice {(counts > 1).nonzero().flatten().tolist()[:8]}"
            )
        self._check_rows()
        self.shared.check()
        self.audits += 1

    def _check_rows(self) -> None:
        """On the CPU the device is where the last launched step has brought it."""
        for req in self.scheduler.sch.waiting_queue:
            assert scheduling.state_of(req) is None, f"{req.rid} waits with a state"
        device = self.pool.runtime.state
        folds, rings = device.tables.fold_lens, device.query_ring.pages
        for req in self.live_requests():
            state = scheduling.state_of(req)
            if state is not None:
                assert state.slot == UPSTREAM.slot(req), req.rid
                fold = int(folds[state.slot])
                assert fold == state.fold, (req.rid, fold, state.fold)
                pages = rings[state.slot].tolist()
                if state.ring is not None:
                    own = (state.ring.token_ids[::PAGE] // PAGE).tolist()
                    assert pages == own, (req.rid, pages, own)
                else:
                    assert not any(pages), (req.rid, pages)


def run_loads(scheduler: InProcessScheduler, audit: PageAudit) -> dict[str, Any]:
    """300 mixed requests over overlap, radix cache and forced retraction on and off."""
    from sglang.srt.managers import scheduler as stock

    names = ("requests", "aborted", "passes", "chunk_passes", "deferred", "retractions")
    total = dict.fromkeys((*names, "longer_than_pool"), 0)
    for seed, load in enumerate(LOADS):
        scheduler.set_radix(load.radix)
        scheduler.set_overlap(load.overlap)
        stock.TEST_RETRACT, stock.TEST_RETRACT_INTERVAL = load.retract, 9
        requests = mixed_requests(
            random.Random(seed), REQUESTS_PER_LOAD, aborts=True, longs=True
        )
        scheduler.on_poll = audit.check
        outputs = scheduler.serve(requests)
        for request in requests:
            out = outputs[request.rid]
            total["requests"] += 1
            total["retractions"] += out.retractions
            if out.kv:
                total["passes"] += out.kv[-1]["passes"]
                total["chunk_passes"] += out.kv[-1]["chunk_passes"]
                total["deferred"] += out.kv[-1]["deferred_passes"]
            aborted = out.finish is None or out.finish["type"] == "abort"
            total["aborted"] += aborted
            total["longer_than_pool"] += not aborted and len(request.ids) > POOL
            if not aborted and not request.stop:
                # SGLang shortens what cannot fit in the pool.
                fits = len(request.ids) + request.max_new < POOL - 2 * PAGE
                assert len(out.ids) == request.max_new or not fits, (request, out)
        available = scheduler.allocator.available_size()
        held = scheduler.sch.tree_cache.evictable_size()
        assert available + held == POOL, (available, held)
        scheduler.flush()
        assert scheduler.allocator.available_size() == POOL
    stock.TEST_RETRACT = False
    return {**total, "audits": audit.audits}


def run_equal_outputs(
    scheduler: InProcessScheduler, requests: list[Request], chunks: str
) -> dict[str, Any]:
    """Overlap and the radix cache change no output: the ids that differ, by switch."""
    runtime = scheduler.allocator.get_kvcache().runtime
    rule = runtime.chunk_rule
    runtime.chunk_rule = dataclasses.replace(rule, mode=chunks)
    results = []
    for overlap, radix in ((True, True), (False, True), (True, False)):
        scheduler.set_radix(radix)
        scheduler.set_overlap(overlap)
        outputs = scheduler.serve(requests)
        results.append(
            {
                rid: Served(out.ids, out.kv[-1]["deferred_passes"], out.retractions)
                for rid, out in outputs.items()
            }
        )
    runtime.chunk_rule = rule
    different: dict[str, Any] = {}
    compared = 0
    first, *others = results
    for name, other in zip(("overlap off", "radix off"), others, strict=True):
        same = [r for r in other if not (other[r].disturbed or first[r].disturbed)]
        compared += len(same)
        different[name] = [r for r in same if other[r].ids != first[r].ids]
    return {**different, "compared": compared}


def chunked_requests(rng: random.Random) -> list[Request]:
    """Prompts without a common prefix, few enough that chunks are never cut short."""
    requests = []
    for i, length in enumerate((150, 420, 211, 300, 333, 190)):
        ids = [rng.randrange(2, VOCAB) for _ in range(length)]
        kv = {"budget": 48 + 16 * (i % 2)}
        requests.append(Request(f"c{i:03}", ids, max_new=50, kv=kv, arrive=4 * i))
    return requests


def run_leak(scheduler: InProcessScheduler) -> str:
    """Plant a leak (a periodic pass frees nothing); SGLang's idle check must see it."""
    scheduler.set_radix(True)
    scheduler.on_poll = None
    original, settling._settle_periodic = settling._settle_periodic, lambda *a: None
    os.environ[STRICT] = "0"
    try:
        ids = [random.Random(1).randrange(2, VOCAB) for _ in range(300)]
        scheduler.serve([Request("leak", ids, 80, kv={"budget": 48})])
    except ValueError as error:
        return str(error)
    finally:
        settling._settle_periodic = original
    return ""


def main(target: str) -> None:
    """Run all scenarios; the report holds results or the traceback."""
    os.environ[STRICT] = "1"
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        args = make_server_args(
            write_tiny_model(Path(folder), FEW_LAYERS),
            compress=True,
            chunked_prefill_size=64,
            max_total_tokens=POOL,
            max_running_requests=12,
            kv_compress_min_budget=48,
            kv_compress_interval=32,
        )
        scheduler = InProcessScheduler(args)
        try:
            # Whole prompts: a chunk's length follows the memory that is free.
            requests = mixed_requests(random.Random(99), 28, aborts=False)
            report["equal"] = run_equal_outputs(scheduler, requests, "never")
            requests = chunked_requests(random.Random(7))
            report["equal_chunks"] = run_equal_outputs(scheduler, requests, "always")
            audit = PageAudit(scheduler)
            report["slots"] = run_slot_reuse(scheduler, audit)
            audit.audits = 0
            report["loads"] = run_loads(scheduler, audit)
            report["leak"] = run_leak(scheduler)
        except BaseException:
            report["traceback"] = traceback.format_exc()
    Path(target).write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
