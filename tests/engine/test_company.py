"""What is kept of a prompt does not depend on who is served beside it."""

from __future__ import annotations

import pytest

from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.texts import prompt

TURN_TOKENS = 64
COUNT = 8
TIED = 0.01
"""Share of what is kept that may differ: sums are not rounded alike in every batch."""


@pytest.mark.parametrize("cached", [False, True])
def test_a_crowd_keeps_what_each_keeps_alone(
    fresh: InProcessScheduler,
    model_path: str,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    """Also of prompts that are cut while others wait for answers, or held whole."""
    runtime = fresh.allocator.get_kvcache().runtime
    monkeypatch.setattr(runtime.turns, "tokens", TURN_TOKENS)
    kv = {"rate": 8, "report_tokens": True}
    requests = [
        Request(
            f"{n}", prompt(model_path, 700 * n, 323 + 32 * n), 8, kv=kv, arrive=2 * n
        )
        for n in range(COUNT)
    ]
    alone = {}
    for request in requests:
        alone |= fresh.serve([request])
        fresh.flush()
    if cached:
        fresh.serve([Request(f"f{it.rid}", it.ids, 2, {"rate": 1}) for it in requests])
    cut = set()

    def on_poll(_: int) -> None:
        if fresh.sch.chunked_req is not None:
            cut.add(fresh.sch.chunked_req.rid)

    fresh.on_poll = on_poll
    crowd = fresh.serve(requests)
    assert (len(cut) > COUNT // 2) is not cached
    for rid, out in crowd.items():
        mine, other = out.kv[-1], alone[rid].kv[-1]
        assert (out.cached_tokens >= 272) is cached
        assert (mine["passes"], other["passes"], mine["deferred_passes"]) == (1, 1, 0)
        held = mine["prompt_token_shares"], other["prompt_token_shares"]
        moved = sum(abs(a - b) for a, b in zip(*held, strict=True))
        assert moved <= TIED * sum(held[1]), rid
        assert out.ids == alone[rid].ids
