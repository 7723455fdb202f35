"""A server whose KV cache is e4m3, on a tiny model; `test_e4m3.py` judges it.

``python -m tests.engine.e4m3 MODEL OUT.pt``: one scheduler a process. Layers get scales
of their own, as a checkpoint may give them. What lies in the cache is written down as
it is stored, so that the oracle attends to the same KVs: one of its own would now and
then fall on the other side of a rounding, which is a step of 6 %.
"""

from __future__ import annotations

import os
import random
import sys
import traceback
from typing import Any

import torch

from sglang_kvc.config.pages import floor_tokens
from sglang_kvc.kernels import append, decode_attention
from sglang_kvc.kernels.kv_dtype import gather_rows, kv_scales
from sglang_kvc.kernels.layout import PAGE_SIZE, Arena
from sglang_kvc.memory.kv_pool import KVScales
from tests.engine.inprocess import InProcessScheduler, Request, make_server_args
from tests.engine.kept import FLAGS, INTERVAL, tokens
from tests.engine.stress import POOL, STRICT, PageAudit, mixed_requests
from tests.engine.tiny_model import LAYERS
from tests.engine.tracer import PassTracer

LENGTH, BUDGET, NEW = 500, 128, 24
MIXED = 40
SCALES = {
    layer: KVScales(0.25 + 0.1 * layer, 0.02 * 2**layer) for layer in range(LAYERS)
}

KVs = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By layer, keys and values [H, tokens, head_dim] in fp32, scales multiplied in."""


class Recorder:
    """Reads back what every call of `append_kv_ref` has stored, for one request."""

    def __init__(self) -> None:
        self._calls: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self._append = append.append_kv_ref

    def __enter__(self) -> Recorder:
        append.append_kv_ref = decode_attention.append_kv_ref = self._record
        return self

    def __exit__(self, *exc: Any) -> None:
        append.append_kv_ref = decode_attention.append_kv_ref = self._append

    def _record(self, arena: Arena, *args: Any, layer: int) -> None:
        self._append(arena, *args, layer=layer)
        cells, heads = args[3], arena.num_kv_heads
        lh = layer * heads + torch.arange(heads)[:, None]
        block = cells // PAGE_SIZE * arena.heads_per_page + lh
        rows = block * PAGE_SIZE + cells % PAGE_SIZE
        stored = zip(arena[:2], kv_scales(arena, layer), strict=True)
        kv = tuple(gather_rows(part, rows, scale) for part, scale in stored)
        self._calls.setdefault(layer, []).append(kv)

    @property
    def kvs(self) -> KVs:
        """Of the request's tokens, in order."""
        joined: KVs = {}
        for layer, calls in self._calls.items():
            k, v = (torch.cat(part, dim=1) for part in zip(*calls, strict=True))
            joined[layer] = (k, v)
        return joined


def serve_one(scheduler: InProcessScheduler, kv: dict[str, Any], new: int) -> Any:
    """One request: its prompt, its answer, its KVs, and what its passes kept."""
    ids = tokens(random.Random(LENGTH), LENGTH)
    runtime = scheduler.allocator.get_kvcache().runtime
    scheduler.flush()
    with Recorder() as recorder, PassTracer(runtime) as tracer:
        out = scheduler.serve([Request("x", ids, new, kv=kv)])["x"]
    kept, lengths = (list(found.values()) for found in (tracer.kept, tracer.lengths))
    return {
        "prompt": ids,
        "output": out.ids,
        "kvs": recorder.kvs,
        "kept": kept[0] if kept else [],
        "lengths": lengths[0] if lengths else [],
    }


def stress(scheduler: InProcessScheduler) -> dict[str, int]:
    """Aborts and retractions; every poll is audited, every freed page poisoned."""
    from sglang.srt.managers import scheduler as stock

    audit = PageAudit(scheduler)
    scheduler.on_poll = audit.check
    stock.TEST_RETRACT, stock.TEST_RETRACT_INTERVAL = True, 9
    requests = mixed_requests(random.Random(0), MIXED, aborts=True, longs=True)
    outputs = scheduler.serve(requests).values()
    stock.TEST_RETRACT = False
    scheduler.flush()
    ended = [(out.finish or {"type": "abort"})["type"] for out in outputs]
    return {
        "free": scheduler.allocator.available_size(),
        "aborted": ended.count("abort"),
        "passes": sum(out.kv[-1]["passes"] for out in outputs if out.kv),
        "retractions": sum(out.retractions for out in outputs),
        "audits": audit.audits,
    }


def main(model: str, target: str) -> None:
    """Serve; the report has results or the traceback."""
    os.environ[STRICT] = "1"
    report: dict[str, Any] = {}
    try:
        args = make_server_args(
            model,
            compress=True,
            kv_cache_dtype="fp8_e4m3",
            chunked_prefill_size=256,
            max_total_tokens=POOL,
            max_running_requests=12,
            **FLAGS,
        )
        scheduler = InProcessScheduler(args)
        pool = scheduler.allocator.get_kvcache()
        report["dtype"] = str(pool.arena.k.dtype)
        report["bytes"] = sum(pool.get_kv_size_bytes())
        report["scales"] = [pool.scales_of(layer) for layer in range(LAYERS)]
        pool.set_scales(SCALES)
        report["whole"] = serve_one(scheduler, {"rate": 1}, NEW)
        new = floor_tokens(LENGTH) + 2 * INTERVAL - LENGTH + 4
        report["packed"] = serve_one(scheduler, {"budget": BUDGET}, new)
        report["stress"] = stress(scheduler)
    except BaseException:
        report["traceback"] = traceback.format_exc()
    torch.save(report, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
