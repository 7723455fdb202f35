"""Which requests get a pass in a step, and what the pass does to SGLang's accounting.

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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.mem_cache.common import evict_from_tree_cache

from sglang_kvc.kernels.layout import PAGE_SIZE
from sglang_kvc.requests.request_options import RequestOptions
from sglang_kvc.scheduling.chunking import probe_tokens
from sglang_kvc.scheduling.lengths import NEVER
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.reporting import Report
from sglang_kvc.scheduling.request_state import PassRecord, RequestState
from sglang_kvc.scheduling.settling import settle_record

if TYPE_CHECKING:
    from sglang_kvc.config.options import KVCompressOptions

PASS_TOKENS_PER_STEP = 8192
"""Resident tokens (per head on average) that the passes of a decode step read."""

ROOM_PER_REQUEST = 4 * PAGE_SIZE
"""Free tokens a request, below which passes are settled as early as possible."""

MAX_DELAY_STEPS = 8
"""Steps that a due pass may be put off to spread the passes of a batch."""


@dataclass
class StepPlan:
    """What a step does besides its forward.

    Attributes
    ----------
    reset_slots : slots whose owner changed.
    passes : eviction passes to run behind the forward.
    folds : in a prefill step with compressed prompts, each request's fold before the
        step's passes and the packed tokens it stands for; empty otherwise.
    """

    reset_slots: list[int] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    folds: list[tuple[int, int]] = field(default_factory=list)


def state_of(req: Any) -> RequestState | None:
    """Compression state of a request; it lives and dies with the request's KV."""
    state: RequestState | None = getattr(req, "kv_compress_state", None)
    return state if state is not None and state.kv is req.kv else None


def _started(req: Any) -> RequestState:
    """State of a request that has been in a prefill step."""
    state = state_of(req)
    assert state is not None
    return state


def policy_of(req: Any) -> RequestPolicy | None:
    """Policy attached by `admission.attach_policy` on entering the queue."""
    return getattr(req, "kv_compress_policy", None)


class PassScheduler:
    """Plans and settles passes; host side only, one per server.

    Parameters
    ----------
    options : the server's options.
    num_slots : rows of SGLang's request table, the padding row included.
    probes : whether the end of a prompt scores its chunks, see `attention.probe`.

    Attributes
    ----------
    due_lens : logical length at which each slot is looked at, int64 [num_slots]; a
        decode step compares it with the batch's lengths in one vector operation.
    """

    def __init__(
        self, options: KVCompressOptions, num_slots: int, *, probes: bool = False
    ) -> None:
        self.options, self.probes = options, probes
        self.due_lens = np.full(num_slots, NEVER, dtype=np.int64)
        # Prompts that the last prefill step has left unfinished.
        self.unfinished: list[Any] = []
        # The prompt that was put off between two chunks, see `admission.add_chunked`.
        self.waiting_prompt: Any = None
        # Of the last round of admission, see `queueing.after_admission`.
        self.preempted: list[Any] = []
        self.stuck: Any = None
        # Passes of the last step, see `settle_launched`.
        self.launched: list[PassRecord] = []

    def plan_extend(self, batch: Any) -> None:
        """After ``prepare_for_extend``: new states, and the passes behind chunks.

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
            plan.folds.append((state.fold, state.budget))
            state.prefilled = req.extend_range.end
            prompt_len = len(req.full_untruncated_fill_ids)
            missing = prompt_len - req.extend_range.end
            if not missing or state.chunk:
                due.append((req, prompt_len))
            else:
                self.unfinished.append(req)
        if not any(fold for fold, _ in plan.folds):
            plan.folds = []
        for req, prompt_len in due:
            self._plan_request(batch, req, req.extend_range.end, plan, prompt_len)
        batch.kv_compress_plan = plan

    def plan_decode(self, batch: Any) -> None:
        """After ``prepare_for_decode``: passes of the requests that are due."""
        plan = StepPlan()
        lens = batch.seq_lens_cpu.numpy()
        due_lens = self.due_lens[batch.req_pool_indices_cpu.numpy()]
        for row in self._affordable(batch.reqs, lens, np.flatnonzero(lens >= due_lens)):
            self._plan_request(batch, batch.reqs[row], int(lens[row]), plan)
        batch.kv_compress_plan = plan

    def _affordable(self, reqs: Any, lens: Any, rows: Any) -> list[int]:
        """Rows that get their pass in this step; the others are due again in the next.

        Requests that started together are due together; one step with all their passes
        would stall every stream. What waits too long goes at once: it may hold two
        pages more than its budget and interval.
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
            if not chosen or spent + cost <= quota or late >= MAX_DELAY_STEPS:
                chosen.append(row)
                spent += cost
        return chosen

    def _new_state(self, req: Any) -> RequestState:
        # A request that did not come through the queue hook (SGLang's own warm-up or
        # health probes) is served uncompressed.
        policy = policy_of(req) or RequestPolicy(
            self.options, RequestOptions(enabled=False)
        )
        _, way = getattr(req, "kv_compress_course", (None, None))
        state = RequestState(
            policy=policy,
            kv=req.kv,
            slot=int(req.req_pool_idx),
            chunk=way.chunk if way is not None else 0,
        )
        req.kv_compress_state = state
        req.customized_info = {"kv_compress": Report(req, state)}
        self.due_lens[state.slot] = NEVER
        return state

    def _plan_request(
        self,
        batch: Any,
        req: Any,
        length: int,
        plan: StepPlan,
        prompt_len: int | None = None,
    ) -> None:
        state = _started(req)
        record = state.propose(req, length, prompt_len)
        if record is not None:
            record.target = self._take_pages(batch, record.budget)
            if record.target is None:
                # Retried at every step: memory comes back as others finish.
                state.deferred_passes += 1
                self.due_lens[state.slot] = length + 1
                return
            between = prompt_len is not None and length < prompt_len
            if between and self.probes:
                room = min(self.options.window, record.budget)
                prompt = req.full_untruncated_fill_ids
                record.probe = probe_tokens(prompt, length, room)
            state.launch(record, decoding=batch.forward_mode.is_decode())
            state.chunk_passes += between
            plan.passes.append(record)
        self.due_lens[state.slot] = state.next_due(length)

    def _take_pages(self, batch: Any, tokens: int) -> Any:
        """Fresh pages for `tokens` tokens, or None if they cannot be spared.

        One page per running request stays free: the next decode step may need it, and
        a retraction costs more than a late pass.
        """
        allocator, tree = batch.token_to_kv_pool_allocator, batch.tree_cache
        need = tokens + len(batch.reqs) * PAGE_SIZE + self.pending_prompt_tokens
        # The cache of others is not emptied for a pass that fails all the same.
        if allocator.available_size() + tree.evictable_size() < need:
            return None
        evict_from_tree_cache(tree, need)
        if allocator.available_size() < need:
            return None
        return allocator.alloc(tokens)

    @property
    def pending_prompt_tokens(self) -> int:
        """Tokens that started prompts still need: a pass must not take their pages."""
        return sum(
            len(req.full_untruncated_fill_ids) - req.extend_range.end + PAGE_SIZE
            for req in self.unfinished
            if req.kv is not None and req.extend_range is not None
        )

    def settle_launched(self, scheduler: Any) -> None:
        """Before ``get_next_batch_to_run``: settle the passes of the last step.

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
        if scheduler.waiting_queue or allocator.available_size() < (
            running * ROOM_PER_REQUEST
        ):
            self.settle(scheduler, launched)

    def settle(self, scheduler: Any, records: list[PassRecord]) -> None:
        """Give back what passes have freed, before their results are processed.

        No wait is needed: whoever gets the pages writes them in a later step of the
        stream on which the pass was launched.
        """
        due = [record for record in records if not record.closed]
        if not due:
            return
        allocator = scheduler.token_to_kv_pool_allocator
        allocator.free_group_begin()
        for record in due:
            settle_record(scheduler.tree_cache, record)
        allocator.free_group_end()
        # SGLang looks at the queue again only when a request has ended.
        scheduler.running_batch.batch_is_full = False
