"""What SGLang's invariant checker must know beside the batches that it looks at."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.lengths import ceil_page
from sglang_kvc.scheduling.passes import PassScheduler, state_of


def uncounted_tokens(checker: Any, passes: PassScheduler | None) -> int:
    """Tokens in target pages of passes in flight, and of a prompt that waits.

    A pass is in flight until it is settled. A prompt that waits for memory between two
    chunks is in no batch.
    """
    batches = {
        id(b): b for b in (checker.get_last_batch(), checker.get_running_batch())
    }
    reqs = {id(r): r for b in batches.values() if b is not None for r in b.reqs}
    total = 0
    waiting = passes.waiting_prompt if passes is not None else None
    if waiting is not None and waiting.kv is not None and id(waiting) not in reqs:
        reqs[id(waiting)] = waiting
        total += ceil_page(waiting.kv.kv_allocated_len) - waiting.cache_protected_len
    for req in reqs.values():
        state = state_of(req)
        if state is not None:
            total += sum(record.budget for record in state.in_flight)
    return total
