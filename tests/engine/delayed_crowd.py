"""Many requests whose first passes wait, in a pool that holds few prompts whole.

``python -m tests.engine.delayed_crowd OUT.json`` serves them with a delay and without.
Every page is audited after every poll; strict idle and busy checks are on.
"""

from __future__ import annotations

import argparse
import json
import random
import traceback
from pathlib import Path
from typing import Any

from sglang_kvc.scheduling import attached
from tests.engine.audited import audited
from tests.engine.fuzz import Setting, apply
from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.stress import POOL, PageAudit
from tests.engine.tiny_model import VOCAB

COUNT = 24
DELAY = 32


def serve_crowd(
    server: InProcessScheduler, audit: PageAudit, delay: int
) -> dict[str, int]:
    """Serve all at once; raises if anything is wrong. Returns what happened."""
    apply(server, Setting(delay=delay, interval=16))
    rng = random.Random(delay)
    requests = [
        Request(
            f"{i:02}",
            [rng.randrange(2, VOCAB) for _ in range(rng.randint(200, 400))],
            max_new=rng.choice([40, 60, 90]),
            kv={"budget": 48},
            arrive=rng.randrange(10),
        )
        for i in range(COUNT)
    ]
    most = {"running": 0, "waiting_to_pass": 0}

    def look(now: int) -> None:
        audit.check(now)
        reqs = server.sch.running_batch.reqs
        states = [attached.state_of(req) for req in reqs]
        whole = sum(state is not None and not state.fold for state in states)
        most["running"] = max(most["running"], len(reqs))
        most["waiting_to_pass"] = max(most["waiting_to_pass"], whole)

    server.on_poll = look
    outputs = server.serve(requests)
    held = server.sch.tree_cache.evictable_size()
    assert server.allocator.available_size() + held == POOL
    server.flush()
    assert server.allocator.available_size() == POOL
    audits, audit.audits = audit.audits, 0
    return {
        "requests": len(requests),
        "answered": sum(len(outputs[it.rid].ids) == it.max_new for it in requests),
        "fewest_passes": min(out.kv[-1]["passes"] for out in outputs.values()),
        "retractions": sum(out.retractions for out in outputs.values()),
        "deferred": sum(out.kv[-1]["deferred_passes"] for out in outputs.values()),
        "audits": audits,
        **{f"most_{name}": value for name, value in most.items()},
    }


def main() -> None:
    """Serve; the report holds counts, or the traceback."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.delayed_crowd")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with audited(POOL) as (server, audit):
        try:
            for name, delay in (("delay", DELAY), ("plain", 0)):
                report[name] = serve_crowd(server, audit, delay)
        except BaseException:
            report["traceback"] = traceback.format_exc()
    args.out.write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
