"""Loads of prompts that are as long and come at once, as benches send them.

``python -m tests.engine.alike OUT.json --seeds 0 1 2`` serves a load a seed on a tiny
model whose last queries take two pages a request: many requests decode in step, while
prompts are cut to what answers can wait for. Strict idle and busy checks, an audit of
every page after every poll.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests.engine.inprocess import InProcessScheduler, Request, make_server_args
from tests.engine.stress import POOL, STRICT, PageAudit
from tests.engine.tiny_model import ONE_LAYER, VOCAB, write_tiny_model

TURN_TOKENS = 32
GROUP = 8
MIXED = 100
"""Seeds from here on: every request has a rate of its own, some of them none."""


def draw(seed: int) -> list[Request]:
    """One load."""
    rng = random.Random(seed)
    rates = [4, 8, 16]
    count, rate = rng.randrange(18, 48), rng.choice(rates)
    length, answer = rng.randrange(50, 450), rng.randrange(20, 300)
    return [
        Request(
            f"{seed}.{number}",
            rng.choices(range(2, VOCAB), k=length),
            max_new=answer,
            kv={"rate": rng.choice([1, 1.5, *rates]) if seed >= MIXED else rate},
        )
        for number in range(count)
    ]


def serve(server: InProcessScheduler, audit: PageAudit, seed: int) -> dict[str, int]:
    """One load, every answer whole; what happened."""
    cut: set[str] = set()

    def on_poll(now: int) -> None:
        audit.check(now)
        unfinished = server.sch.chunked_req
        if unfinished is not None:
            cut.add(unfinished.rid)

    server.on_poll = on_poll
    requests = draw(seed)
    outputs = server.serve(requests)
    for request in requests:
        out = outputs[request.rid]
        assert len(out.ids) == request.max_new, (request.rid, len(out.ids), out.finish)
    server.flush()
    assert server.allocator.available_size() == POOL
    retractions = sum(out.retractions for out in outputs.values())
    return {"requests": len(requests), "cut": len(cut), "retractions": retractions}


def main() -> None:
    """Serve all seeds; the report holds counts, or the traceback."""
    os.environ[STRICT] = "1"
    parser = argparse.ArgumentParser(prog="python -m tests.engine.alike")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    report: dict[str, Any] = {"requests": 0, "cut": 0, "retractions": 0}
    with tempfile.TemporaryDirectory() as folder:
        server = InProcessScheduler(
            make_server_args(
                write_tiny_model(Path(folder), ONE_LAYER, GROUP),
                compress=True,
                chunked_prefill_size=1024,
                max_total_tokens=POOL,
                max_running_requests=64,
                kv_compress_min_budget=32,
                kv_compress_window=16,
                kv_compress_protected=16,
                kv_compress_interval=32,
            )
        )
        server.allocator.get_kvcache().runtime.turns.tokens = TURN_TOKENS
        audit = PageAudit(server)
        for seed in args.seeds:
            try:
                for name, value in serve(server, audit, seed).items():
                    report[name] += value
            except BaseException:
                report["failed"] = [seed, traceback.format_exc()]
                break
    args.out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
