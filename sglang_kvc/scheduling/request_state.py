"""What the host knows of one request: which KVs are packed, what is in flight.

Two clocks (integration contract with SGLang's overlap scheduler, which launches step
k + 1 before it processes the result of step k):

* *launch order*: what the next plan must assume (``fold``, ``packed``, ``observed``);
* *result order*: what the request owns in the allocator (``settled_*``).

Logical length counts every token of the request; resident length counts the tokens of
memory a KV head holds on average. This module imports neither torch nor SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sglang_kvc.config.options import PAGE_SIZE
from sglang_kvc.scheduling.lengths import NEVER, floor_page
from sglang_kvc.scheduling.policy import RequestPolicy


@dataclass(eq=False)
class PassRecord:
    """One planned eviction pass: launched with a step, settled with its result.

    Attributes
    ----------
    req : SGLang's request; only touched while the pass is not closed.
    state : the state of the admission that planned the pass.
    slot : row of the request in the device tables.
    seq_len : logical length at the step that carries the pass.
    fold_old, fold_new : packed logical tokens before and after.
    budget_old, budget : packed tokens per head before and after (0 = none before).
    query_start : first position whose query is observed.
    pool_tail : scores of the tail are max-pooled (it is consecutive text, new to us).
    recorded : every observed query was decoded, so its log-sum-exp is known.
    prompt_len : tokens of the prompt while it is prefilled, else 0.
    probe : last tokens of the prompt, to be run before the pass, see `probe`.
    repeated : earlier passes were scored by the same queries.
    target : token ids of the fresh pages, int64 [budget].
    head_blocks : with ``report_heads``, int32 [L * H + 1] on the host: prefix sum of
        the blocks that each head keeps; filled when the step is done.
    closed : settled, or its request is gone: nothing is left to free.
    """

    req: Any
    state: RequestState
    slot: int
    seq_len: int
    fold_old: int
    fold_new: int
    budget_old: int
    budget: int
    query_start: int
    pool_tail: bool
    recorded: bool
    target: Any
    prompt_len: int = 0
    probe: tuple[int, ...] = ()
    repeated: bool = False
    head_blocks: Any = None
    closed: bool = False

    @property
    def is_first(self) -> bool:
        """First pass of the request: everything it holds is in token layout."""
        return self.budget_old == 0

    @property
    def between_chunks(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.seq_len < self.prompt_len

    @property
    def gain(self) -> int:
        """Tokens that come back when the pass is settled."""
        return self.budget_old + self.fold_new - self.fold_old


@dataclass(eq=False)
class RequestState:
    """Compression state of one admission of a request (a retraction ends it).

    `kv` is SGLang's record of the request's memory; the state belongs to it. `chunk` is
    the length of a chunk if the prompt is compressed between chunks, else 0.
    """

    policy: RequestPolicy
    kv: Any
    slot: int
    chunk: int = 0
    # Launch order.
    fold: int = 0
    budget: int = 0
    observed: int = 0
    prefilled: int = 0
    probed: bool = False
    # Result order.
    settled_fold: int = 0
    settled_packed: Any = None
    settled_blocks: Any = None
    in_flight: list[PassRecord] = field(default_factory=list)
    # Reported in meta_info.
    passes: int = 0
    chunk_passes: int = 0
    deferred_passes: int = 0
    peak_resident: int = 0

    def resident(self, length: int) -> int:
        """Resident tokens per KV head at logical `length` (launch order)."""
        return self.budget + length - self.fold

    def next_due(self, length: int) -> int:
        """Logical length, above `length`, at which the next pass should be looked at.

        NEVER if there is none: not asked for, never worth it, or not even an empty pool
        has room for a second copy beside what the request holds by then.
        """
        policy = self.policy
        if self.fold == 0:
            due = policy.first_due(length)
        else:
            # With a rate the budget grows, too; what it takes is no gain.
            grown = policy.budget(length) - self.budget
            least = policy.least_gain(self.budget + grown)
            due = max(policy.growth(self.budget), grown + least)
            due = max(self.fold + due, length + 1)
        if due >= NEVER or not policy.pass_fits(self.resident(due), policy.budget(due)):
            return NEVER
        return due

    def gain(self, length: int, prompt_len: int | None = None) -> int:
        """Tokens by which a pass at logical `length` would shrink the request.

        `prompt_len` as in `propose`.
        """
        held = self.budget + floor_page(length) - self.fold
        return held - self.policy.budget(prompt_len or length)

    def propose(
        self, req: Any, length: int, prompt_len: int | None = None
    ) -> PassRecord | None:
        """The pass that is worth running at logical `length`, without its target.

        Parameters
        ----------
        length : tokens computed so far.
        prompt_len : tokens of the prompt while it is prefilled: a pass between chunks
            keeps what the whole prompt may keep.

        Returns
        -------
        PassRecord or None
            None if it would not give back enough, or if not even an empty pool has room
            for its copy.
        """
        fold_new = floor_page(length)
        budget = self.policy.budget(prompt_len or length)
        between = prompt_len is not None and length < prompt_len
        # A chunk must make room for the next one, whatever the copy costs.
        least = PAGE_SIZE if between else self.policy.least_gain(budget)
        if self.gain(length, prompt_len) < least:
            return None
        if not self.policy.pass_fits(self.resident(length), budget):
            return None
        window = self.policy.options.window
        query_start = max(self.observed, length - window, 0)
        return PassRecord(
            req=req,
            state=self,
            slot=self.slot,
            seq_len=length,
            fold_old=self.fold,
            fold_new=fold_new,
            budget_old=self.budget,
            budget=budget,
            query_start=query_start,
            pool_tail=self.budget == 0 or prompt_len is not None,
            recorded=query_start >= self.prefilled,
            target=None,
            prompt_len=prompt_len or 0,
            repeated=self.probed and prompt_len is not None,
        )

    def launch(self, record: PassRecord, *, decoding: bool) -> None:
        """Move the launch-order state past `record`.

        The peak leaves out the prompt: it must be resident while it is prefilled.
        """
        if decoding:
            self.peak_resident = max(self.peak_resident, self.resident(record.seq_len))
        self.fold, self.budget = record.fold_new, record.budget
        self.observed = record.seq_len
        self.probed = self.probed or bool(record.probe)
        self.passes += 1
        self.in_flight.append(record)

    def settle(self, record: PassRecord) -> None:
        """Move the result-order state past `record`."""
        record.closed = True
        self.in_flight.remove(record)
        self.settled_fold = record.fold_new
        self.settled_packed = record.target
        self.settled_blocks = record.head_blocks

    def abandon(self) -> list[PassRecord]:
        """Close every pass in flight; the caller must free their targets."""
        dead, self.in_flight = self.in_flight, []
        for record in dead:
            record.closed = True
        return dead

    def summary(self, length: int) -> dict[str, Any]:
        """What ``meta_info["kv_compress"]`` shows for logical `length`."""
        resident = self.resident(length)
        budget = self.policy.budget(length)
        report = {
            "enabled": budget != NEVER,
            "logical_tokens": length,
            "resident_tokens": resident,
            "peak_resident_tokens": max(self.peak_resident, resident)
            if self.fold
            else resident,
            "budget_tokens": (self.budget or budget) if budget != NEVER else None,
            "passes": self.passes,
            "chunk_passes": self.chunk_passes,
            "deferred_passes": self.deferred_passes,
        }
        if self.settled_blocks is not None:
            blocks = self.settled_blocks.diff() * PAGE_SIZE
            report["packed_tokens_per_head"] = blocks.tolist()
        return report
