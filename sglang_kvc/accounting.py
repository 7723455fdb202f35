"""What SGLang's invariant checker must know of passes in flight."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling import state_of


def tokens_in_flight(checker: Any) -> int:
    """Tokens in target pages of passes that are launched but not settled."""
    batches = {
        id(b): b for b in (checker.get_last_batch(), checker.get_running_batch())
    }
    reqs = {id(r): r for b in batches.values() if b is not None for r in b.reqs}
    total = 0
    for req in reqs.values():
        state = state_of(req)
        if state is not None:
            total += sum(record.budget for record in state.in_flight)
    return total
