"""A scheduler with requests and no progress is a failed test, not a hung one."""

from __future__ import annotations

from typing import Any

from sglang_kvc.scheduling.acceptance import course_of
from sglang_kvc.scheduling.attached import state_of
from sglang_kvc.scheduling.headroom import Headroom
from sglang_kvc.upstream.generation import UPSTREAM
from tests.doubles import adder_class

POLLS = 60
"""Polls without a forward; the overlap scheduler needs one or two."""
FORWARDS = 600
"""Forwards without a token for anybody: a prompt of as many chunks."""


class NoProgressError(AssertionError):
    """Requests wait, and nothing happens. The message says who and for what."""


class LivenessWatch:
    """Looks at a scheduler at every poll.

    Parameters
    ----------
    scheduler : SGLang's Scheduler.
    sent : what it has sent, a list that grows.
    """

    def __init__(self, scheduler: Any, sent: list[Any]) -> None:
        self.scheduler, self.sent = scheduler, sent
        self.reset()

    def reset(self) -> None:
        """Forget what was seen: a new load begins, or the scheduler was paused."""
        self._forwards = self._told_at = self.scheduler.forward_ct
        self._told, self._polls = len(self.sent), 0

    def look(self) -> None:
        """Raise `NoProgressError` if nothing has happened for too long."""
        sch = self.scheduler
        if sch._engine_paused or sch.is_fully_idle():
            self.reset()
            return
        if len(self.sent) != self._told:
            self._told, self._told_at, self._polls = (
                len(self.sent),
                sch.forward_ct,
                0,
            )
        if sch.forward_ct != self._forwards:
            self._forwards, self._polls = sch.forward_ct, 0
        self._polls += 1
        if self._polls > POLLS:
            raise NoProgressError(f"no forward in {POLLS} polls\n{dump(sch)}")
        if sch.forward_ct - self._told_at > FORWARDS:
            raise NoProgressError(f"no token in {FORWARDS} forwards\n{dump(sch)}")


def dump(scheduler: Any) -> str:
    """Who waits, who runs, both sums of admission, free pages; one line each."""
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    running = scheduler.running_batch
    passes = allocator.get_kvcache().runtime.pass_scheduler
    lines = [
        f"pool {allocator.size}: free {allocator.available_size()}, evictable "
        f"{tree.evictable_size()}, protected {tree.protected_size()}",
        f"queue {len(scheduler.waiting_queue)}, running {len(running.reqs)}, full "
        f"{running.batch_is_full}, passes in flight {len(passes.launched)}",
    ]
    lines += [f"  waits   {_describe(req)}" for req in scheduler.waiting_queue[:8]]
    if scheduler.chunked_req is not None:
        state = (
            "put off" if passes.waiting_prompt is scheduler.chunked_req else "goes on"
        )
        lines.append(f"  started {_describe(scheduler.chunked_req)}, {state}")
    lines += [f"  runs    {_describe(req)}" for req in running.reqs[:8]]
    sums = _sums(scheduler)
    return "\n".join([*lines, f"sums: now {sums[0]:.0f}, steady {sums[1]:.0f}"])


def _describe(req: Any) -> str:
    state, way = state_of(req), course_of(req)
    text = (
        f"{req.rid}: {len(req.origin_input_ids)} + {len(req.output_ids)} of "
        f"{req.sampling_params.max_new_tokens}, prefix {UPSTREAM.prefix_len(req)}, "
        f"{way.way.name if way is not None else 'no way'}"
    )
    if state is not None:
        text += (
            f", fold {state.fold}, packed {state.packed}, in flight "
            f"{len(state.in_flight)}, deferred {state.deferred_passes}"
        )
    return text


def _sums(scheduler: Any) -> tuple[float, float]:
    adder = adder_class(scheduler)(
        scheduler.page_size,
        scheduler.tree_cache,
        scheduler.token_to_kv_pool_allocator,
        scheduler.running_batch,
        scheduler.new_token_ratio_tracker.current,
        scheduler.max_prefill_tokens,
        scheduler.chunked_prefill_size,
    )
    headroom = Headroom.of(adder)
    return headroom.now, headroom.steady
