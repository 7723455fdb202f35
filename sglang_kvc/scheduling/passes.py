"""Plan the passes of a step, and settle them in SGLang's accounting.

One rule: allocate while scheduling, copy on the forward stream, free before the next
step is scheduled. The functions here are called from the hooks in `patches/`:

=====================================  =========================================
SGLang                                 here
=====================================  =========================================
after ScheduleBatch.prepare_for_*      `PassScheduler.plan_extend`, `plan_decode`
around TpModelWorker.forward_batch...  `attention.step`
before Scheduler.get_next_batch_...    `PassScheduler.settle_launched`
before Scheduler.process_batch_result  `PassScheduler.settle`
around PrefillAdder                    `admission.py`
=====================================  =========================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.mem_cache.common import evict_from_tree_cache

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.requests.request_options import RequestOptions
from sglang_kvc.scheduling import attached
from sglang_kvc.scheduling.attached import policy_of, state_of
from sglang_kvc.scheduling.chunking import probe_tokens
from sglang_kvc.scheduling.lengths import NEVER_DUE, UNLIMITED
from sglang_kvc.scheduling.pass_decision import PassDecision, Probe
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.reporting import Report
from sglang_kvc.scheduling.request_state import PassInFlight, RequestState
from sglang_kvc.scheduling.resuming import resume
from sglang_kvc.scheduling.rings import Rings
from sglang_kvc.scheduling.settling import settle_pass
from sglang_kvc.scheduling.step_plan import Fold, StepPlan
from sglang_kvc.upstream.generation import UPSTREAM
from sglang_kvc.upstream.types import Req, ScheduleBatch, Scheduler

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions
    from sglang_kvc.scheduling.meter import Meter

PASS_TOKENS_PER_STEP = 8192
"""Resident tokens (per head on average) that the passes of a decode step read."""

ROOM_PER_REQUEST = 4 * PAGE_SIZE
"""Free tokens a request, below which passes are settled as early as possible."""

MAX_DELAY_STEPS = 8
"""Steps that a due pass may be put off to spread the passes of a batch."""


def _started(req: Req) -> RequestState:
    """State of a request that has been in a prefill step."""
    state = state_of(req)
    assert state is not None
    return state


def _extend_end(req: Req) -> int:
    """Where the running prefill step of a request ends."""
    end = UPSTREAM.extend_end(req)
    assert end is not None
    return end


class PassScheduler:
    """Plans and settles passes; host side only, one per server.

    Parameters
    ----------
    options : the server's options.
    num_slots : rows of SGLang's request table, the padding row included.
    probes : whether the end of a prompt scores its chunks, see `attention.probe`.
    ring_tokens : of the pool, that the last queries of a request take.

    Attributes
    ----------
    due_lens : logical length at which each slot is looked at, int64 [num_slots]; a
        decode step compares it with the batch's lengths in one vector operation. Where
        no pass is to come it is `NEVER_DUE`.
    rings : what all of these take.
    meter : what counts for ``/metrics``; None if they are off.
    """

    def __init__(
        self,
        options: KVCompressOptions,
        num_slots: int,
        *,
        probes: bool = False,
        ring_tokens: int = 0,
    ) -> None:
        self.options, self.probes = options, probes
        self.rings = Rings(ring_tokens)
        self.due_lens = np.full(num_slots, NEVER_DUE, dtype=np.int64)
        # Prompts that the last prefill step has left unfinished.
        self.unfinished: list[Any] = []
        # The prompt that was put off between two chunks, see `admission.add_chunked`.
        self.waiting_prompt: Any = None
        # Of the last round of admission, see `queueing.after_admission`.
        self.preempted: list[Any] = []
        self.stuck: Any = None
        # Passes of the last step, see `settle_launched`.
        self.launched: list[PassInFlight] = []
        self.meter: Meter | None = None

    def plan_extend(self, batch: ScheduleBatch) -> None:
        """Plan a prefill step, after ``prepare_for_extend``: states and passes.

        A prompt gets a pass behind its last chunk; one that is compressed between
        chunks (`chunking`) behind each of them.
        """
        plan = StepPlan()
        self.unfinished = []
        due = []
        for req in batch.reqs:
            state = state_of(req)
            if state is None:
                state = self._new_state(req)
                plan.reset_slots.append(state.slot)
                resumed = resume(batch.tree_cache, req, state)
                if resumed is not None:
                    plan.resumed.append(resumed)
            if state.lacks_ring:
                self._take_ring(batch, state, UPSTREAM.prefix_len(req), plan)
            plan.folds.append(Fold(state.fold, state.packed))
            state.prefilled = end = _extend_end(req)
            prompt_len = len(req.full_untruncated_fill_ids)
            missing = prompt_len - end
            if not missing or state.chunk:
                due.append((req, prompt_len))
            else:
                self.unfinished.append(req)
        if not any(fold.tokens for fold in plan.folds):
            plan.folds = []
        for req, prompt_len in due:
            length = _extend_end(req)
            decision = _started(req).propose_after_chunk(length, prompt_len)
            self._plan_request(batch, req, length, plan, decision)
        self._attach(batch, plan)

    def plan_decode(self, batch: ScheduleBatch) -> None:
        """Plan a decode step, after ``prepare_for_decode``: passes that are due."""
        plan = StepPlan()
        lens = batch.seq_lens_cpu.numpy()
        due_lens = self.due_lens[batch.req_pool_indices_cpu.numpy()]
        rows = np.flatnonzero(lens >= due_lens)
        room = batch.tree_cache.room_beside_snapshots - len(lens) * PAGE_SIZE
        for row in self._affordable(batch.reqs, lens, rows, room):
            req, length = batch.reqs[row], int(lens[row])
            decision = _started(req).propose_while_decoding(length)
            self._plan_request(batch, req, length, plan, decision)
        self._attach(batch, plan)

    def _attach(self, batch: ScheduleBatch, plan: StepPlan) -> None:
        if self.meter is not None and plan.passes:
            self.meter.planned(plan.passes)
        plan.copies = batch.tree_cache.take_copies()
        attached.attach_plan(batch, plan)

    def _affordable(
        self, reqs: Any, lens: Any, rows: Any, room: float = UNLIMITED
    ) -> list[int]:
        """Rows that get their pass in this step; the others are due again in the next.

        Requests that started together are due together; one step with all their passes
        would stall every stream. What waits too long goes at once: it may hold two
        pages more than its budget and interval. But copies, which are needed for a
        step, push out no snapshots: `room` is what they find, and one always goes.
        """
        states = [_started(reqs[row]) for row in rows]
        costs = [
            state.resident(int(lens[row]))
            for row, state in zip(rows, states, strict=True)
        ]
        quota = max(PASS_TOKENS_PER_STEP, sum(costs) // MAX_DELAY_STEPS)
        chosen: list[int] = []
        spent = 0
        for row, state, cost in zip(rows.tolist(), states, costs, strict=True):
            late = lens[row] - self.due_lens[state.slot]
            in_time = spent + cost <= quota or late >= MAX_DELAY_STEPS
            if not chosen or (in_time and spent + cost <= room):
                chosen.append(row)
                spent += cost
        return chosen

    def _new_state(self, req: Req) -> RequestState:
        # A request that did not come through the queue hook (SGLang's own warm-up or
        # health probes) is served uncompressed.
        policy = policy_of(req) or RequestPolicy(
            self.options, RequestOptions(enabled=False)
        )
        _, way = attached.known_course(req) or (None, None)
        state = RequestState(
            policy=policy,
            kv=req.kv,
            slot=UPSTREAM.slot(req),
            chunk=way.chunk if way is not None else 0,
            wants_ring=way is not None and way.ring > 0,
        )
        attached.attach_state(req, state)
        req.customized_info = {"kv_compress": Report(req, state)}
        self.due_lens[state.slot] = NEVER_DUE
        return state

    def _defer(self, state: RequestState, due: int) -> None:
        """Put a pass off to logical length `due`."""
        state.deferred_passes += 1
        if self.meter is not None:
            self.meter.deferred()
        self.due_lens[state.slot] = due

    def _take_ring(
        self, batch: ScheduleBatch, state: RequestState, start: int, plan: StepPlan
    ) -> bool:
        """Take the ring of a request whose step begins at `start`, if there is one."""
        ring = self.rings.take(batch)
        if ring is None:
            return False
        state.own_ring(ring, start)
        plan.rings[state.slot] = ring
        return True

    def _plan_request(
        self,
        batch: ScheduleBatch,
        req: Req,
        length: int,
        plan: StepPlan,
        decision: PassDecision | None,
    ) -> None:
        """Launch the pass of a request that is due at `length`, if it is worth one."""
        state = _started(req)
        if decision is not None and state.lacks_ring:
            # Admission has asked for its pages, so this should not come to pass.
            given = self._take_ring(batch, state, length - 1, plan)
            self._defer(state, length + (self.options.window if given else 1))
            return
        if decision is not None:
            dest_tokens = self._take_pages(batch, decision.packed_new)
            if dest_tokens is None:
                # Retried at every step: memory comes back as others finish.
                self._defer(state, length + 1)
                return
            probe = self._probe(req, decision)
            plan.passes.append(state.launch(decision, req, dest_tokens, probe))
        due = state.next_due(length)
        self.due_lens[state.slot] = NEVER_DUE if due is None else due

    def _probe(self, req: Req, decision: PassDecision) -> Probe | None:
        """Probe of a pass: the prompt's end, if that scores it."""
        if not decision.between_chunks or not self.probes:
            return None
        room = min(self.options.window, decision.packed_new)
        prompt = req.full_untruncated_fill_ids
        token_ids = probe_tokens(prompt, decision.seq_len, room)
        return Probe(token_ids, len(prompt) - len(token_ids)) if token_ids else None

    def _take_pages(self, batch: ScheduleBatch, tokens: int) -> Any:
        """Take fresh pages for `tokens` tokens; None if they cannot be spared.

        One page per running request stays free: the next decode step may need it, and
        a retraction costs more than a late pass.
        """
        allocator, tree = batch.token_to_kv_pool_allocator, batch.tree_cache
        need = tokens + len(batch.reqs) * PAGE_SIZE + self.pending_prompt_tokens
        # The cache of others is not emptied for a pass that fails all the same.
        if allocator.available_size() + tree.reclaimable < need:
            return None
        evict_from_tree_cache(tree, need)
        if allocator.available_size() < need:
            return None
        return allocator.alloc(tokens)

    @property
    def pending_prompt_tokens(self) -> int:
        """Tokens that started prompts still need: a pass must not take their pages."""
        return sum(
            len(req.full_untruncated_fill_ids) - end + PAGE_SIZE
            for req in self.unfinished
            if UPSTREAM.holds_memory(req)
            and (end := UPSTREAM.extend_end(req)) is not None
        )

    def settle_launched(self, scheduler: Scheduler) -> None:
        """Settle the passes of the last step, before ``get_next_batch_to_run``.

        With the overlap scheduler its result comes later, but all that is needed of it
        is known: every token below the fold was an input of that step. While nobody
        waits for the memory it is left to the result: here it delays the next step.
        """
        launched, self.launched = self.launched, []
        if not scheduler.running_batch.reqs:
            # With nothing that could end, SGLang would not look at the queue again.
            scheduler.running_batch.batch_is_full = False
        allocator = scheduler.token_to_kv_pool_allocator
        last = scheduler.last_batch
        running = len(scheduler.running_batch.reqs) + (len(last.reqs) if last else 0)
        if self.meter is not None and not running and scheduler.chunked_req is None:
            self.meter.rest()
        if scheduler.waiting_queue or allocator.available_size() < (
            running * ROOM_PER_REQUEST
        ):
            self.settle(scheduler, launched)

    def settle(self, scheduler: Scheduler, launched: list[PassInFlight]) -> None:
        """Give back what passes have freed, before their results are processed.

        No wait is needed: whoever gets the pages writes them in a later step of the
        stream on which the pass was launched.
        """
        due = [it for it in launched if not it.closed]
        if not due:
            return
        allocator = scheduler.token_to_kv_pool_allocator
        allocator.free_group_begin()
        for it in due:
            settle_pass(scheduler.tree_cache, it)
        allocator.free_group_end()
        # SGLang looks at the queue again only when a request has ended.
        scheduler.running_batch.batch_is_full = False
