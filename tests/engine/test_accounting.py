"""SGLang's busy check adds up what every request owns, also one in no batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.engine.inprocess import InProcessScheduler, Request
from tests.engine.texts import prompt

LEFT = 48
"""Tokens that are left in the pool while the prompt must wait."""


def test_a_waiting_prompt_is_counted_once(
    fresh: InProcessScheduler, model_path: str
) -> None:
    """Put off between two chunks it is in no batch; newer releases count it themselves.

    What the check adds up is what is neither free nor in the tree, at every poll.
    """
    allocator, tree = fresh.allocator, fresh.sch.tree_cache
    runtime = allocator.get_kvcache().runtime
    passes, rule = runtime.pass_scheduler, runtime.chunk_rule
    held: list[Any] = []
    taken = 0
    waited: list[bool] = []

    def look(now: int) -> None:
        nonlocal taken
        if fresh.sch.last_batch is not None:
            used = allocator.size - allocator.available_size() - taken
            used -= tree.evictable_size() + tree.protected_size()
            full, _ = fresh.sch.invariant_checker._get_total_uncached_sizes()
            assert full == used, (now, passes.waiting_prompt)
            waited.append(passes.waiting_prompt is not None)
        if 3 <= now < 14:
            # Also what its last chunk is about to give back.
            passes.settle(fresh.sch, passes.launched)
            more = max(allocator.available_size() - LEFT, 0)
            taken += more
            held.append(allocator.alloc(more))
        for pages in held if now == 14 else ():
            taken = 0
            allocator.free_segment(pages, start_pos=0)

    fresh.set_radix(False)
    fresh.on_poll = look
    runtime.chunk_rule = dataclasses.replace(rule, mode="always")
    requests = [
        Request("short", prompt(model_path, 0, 40), max_new=24, kv={"enabled": False}),
        Request("long", prompt(model_path, 100, 900), 4, kv={"budget": 64}, arrive=1),
    ]
    try:
        outputs = fresh.serve(requests)
    finally:
        runtime.chunk_rule = rule
    assert len(outputs["long"].ids) == 4
    assert sum(waited) > 3
    assert not all(waited)
