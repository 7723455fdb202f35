"""Count the tokens that SGLang's invariant checker does not find in its batches."""

from __future__ import annotations

from sglang_kvc.config.pages import ceil_tokens
from sglang_kvc.scheduling.attached import state_of
from sglang_kvc.scheduling.passes import PassScheduler
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import InvariantChecker


def uncounted_tokens(checker: InvariantChecker, passes: PassScheduler) -> int:
    """Tokens in rings, in target pages of passes in flight, and of a waiting prompt.

    A pass is in flight until it is settled. A prompt that waits between two chunks, for
    memory or for its turn, is in no batch.
    """
    batches = {
        id(b): b for b in (checker.get_last_batch(), checker.get_running_batch())
    }
    reqs = {id(r): r for b in batches.values() if b is not None for r in b.reqs}
    total = passes.rings.held
    waiting = passes.waiting_prompt
    if (
        waiting is not None
        and UPSTREAM.holds_memory(waiting)
        and id(waiting) not in reqs
    ):
        reqs[id(waiting)] = waiting
        if not UPSTREAM.checker_counts_waiting:
            total += ceil_tokens(UPSTREAM.allocated_len(waiting))
            total -= UPSTREAM.protected_len(waiting)
    for req in reqs.values():
        state = state_of(req)
        if state is not None:
            total += sum(it.decision.packed_new for it in state.in_flight)
    return total
