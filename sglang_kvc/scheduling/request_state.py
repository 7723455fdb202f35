"""State of one request on the host: which KVs are packed, what is in flight.

Two clocks (integration contract with SGLang's overlap scheduler, which launches step
k + 1 before it processes the result of step k):

* *launch order*: what the next plan must assume (``fold``, ``packed``, ``observed``);
* *result order*: what the request owns in the allocator (``settled_*``).

Logical length counts every token of the request; resident length counts the tokens of
memory a KV head holds on average. This module imports neither torch nor SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_kvc.config.pages import PAGE_SIZE, floor_tokens
from sglang_kvc.scheduling.pass_decision import PassDecision, Phase, Probe
from sglang_kvc.scheduling.policy import RequestPolicy
from sglang_kvc.scheduling.residency import Residency
from sglang_kvc.sessions.snapshot import Hit, Snapshot

if TYPE_CHECKING:
    from sglang_kvc.scheduling.rings import Ring
    from sglang_kvc.upstream.types import Allocator

ENDED = object()
"""In place of SGLang's record of the memory, once that was given back.

On 0.5.17 a request without memory has None as its record: None would name it.
"""


@dataclass(eq=False)
class PassInFlight:
    """A launched pass, until it is settled or its request is gone.

    Attributes
    ----------
    decision : what is done.
    req : SGLang's request; only touched while the pass is not closed.
    state : the state of the admission that planned the pass.
    dest_tokens : token ids of the fresh pages, int64 [packed_new].
    probe : what runs before it.
    head_blocks : with ``report_heads``, int32 [L, heads] on the host: blocks that each
        head keeps, on all ranks; filled when the step is done.
    token_shares : with ``report_tokens``, int16 [prompt] on the host: of each prompt
        token, the heads that hold it, in thousandths of all; filled as above.
    offsets, unit : where the blocks of each head begin, and the slot's novelty unit, on
        the device: with sessions, filled when the pass is launched.
    closed : settled, or its request is gone: nothing is left to free.
    """

    decision: PassDecision
    req: Any
    state: RequestState
    dest_tokens: Any
    probe: Probe | None = None
    head_blocks: Any = None
    token_shares: Any = None
    offsets: Any = None
    unit: Any = None
    closed: bool = False


@dataclass(eq=False)
class RequestState:
    """Compression state of one admission of a request (a retraction ends it).

    Attributes
    ----------
    policy : when and how far the request is compressed.
    kv : SGLang's record of the request's memory; the state belongs to it. Then `ENDED`.
    slot : row of the request in the device tables.
    chunk : tokens of a chunk if the prompt is compressed between chunks, else 0.
    wants_ring : it can reach a pass that looks at queries, so it takes a ring.
    ring : where its last queries are.
    fold, packed : logical tokens that are packed, and the tokens of memory they take.
    observed : positions below it have been observed by a pass.
    prefilled : positions below it are prompt, or were recomputed after a retraction.
    probed : the end of the prompt has scored a pass.
    settled_fold, settled_packed : fold, and token ids of the packed pages, that the
        request owns in the allocator.
    settled_blocks, settled_shares : as `PassInFlight.head_blocks` and `token_shares`,
        of the last settled pass.
    settled_offsets, settled_unit : as `PassInFlight.offsets` and `unit`, likewise.
    settled_passes : how many were settled.
    borrowed : the snapshot whose packed pages the request reads; None with its own.
    own_from : tokens of the row before it are packed, or pages of the prefix tree.
    positions : with ``report_tokens``, where in the text each packed KV stands; the
        pass runner's (`eviction.reports`).
    in_flight : launched passes that are not settled.
    """

    policy: RequestPolicy
    kv: Any
    slot: int
    chunk: int = 0
    wants_ring: bool = False
    ring: Ring | None = None
    # Launch order.
    fold: int = 0
    packed: int = 0
    observed: int = 0
    prefilled: int = 0
    probed: bool = False
    positions: Any = None
    # Result order.
    settled_fold: int = 0
    settled_packed: Any = None
    settled_blocks: Any = None
    settled_shares: Any = None
    settled_offsets: Any = None
    settled_unit: Any = None
    settled_passes: int = 0
    borrowed: Snapshot | None = None
    own_from: int = 0
    in_flight: list[PassInFlight] = field(default_factory=list)
    # Reported in meta_info.
    passes: int = 0
    chunk_passes: int = 0
    deferred_passes: int = 0
    peak_resident: int = 0
    residency: Residency = field(default_factory=Residency)
    resumed_tokens: int = 0
    generations: int = 0
    turns_before: int = 0

    def resume(self, hit: Hit) -> None:
        """Start from a snapshot, and from a continuation of it."""
        snapshot, length = hit.snapshot, hit.tokens
        self.fold = self.settled_fold = snapshot.fold
        self.packed = snapshot.packed
        # Whoever had the slot before has left its queries in the ring.
        self.observed = self.own_from = self.resumed_tokens = length
        self.generations, self.turns_before = snapshot.passes, snapshot.turns
        self.borrowed = snapshot
        snapshot.borrowers += 1
        snapshot.resumed += 1
        snapshot.superseded = False

    def give_back(self) -> None:
        """Read the borrowed snapshot no longer; the tree's lock is another's affair."""
        if self.borrowed is not None:
            self.borrowed.borrowers -= 1
            self.borrowed = None

    def own(self, length: int) -> int:
        """Tokens of memory that the request would give back at logical `length`."""
        if self.borrowed is not None:
            return length - self.own_from
        return self.resident(length)

    @property
    def ring_tokens(self) -> int:
        """Tokens of the pool that its last queries take."""
        return len(self.ring.token_ids) if self.ring is not None else 0

    @property
    def lacks_ring(self) -> bool:
        """Whether there was no room for its ring yet."""
        return self.wants_ring and self.ring is None

    @property
    def _is_never_observed(self) -> bool:
        """Whether passes look at queries and its course has none of them."""
        return self.policy.ring_tokens > 0 and not self.wants_ring

    def own_ring(self, ring: Ring, start: int) -> None:
        """Take a ring that knows the queries from position `start` on."""
        self.ring = ring
        self.observed = max(self.observed, start)

    def release_ring(self, allocator: Allocator) -> None:
        """Give the ring back, if there is one."""
        ring, self.ring = self.ring, None
        if ring is not None:
            ring.give_back(allocator)

    def resident(self, length: int) -> int:
        """Resident tokens per KV head at logical `length` (launch order)."""
        return self.packed + length - self.fold

    def next_due(self, length: int) -> int | None:
        """Logical length, above `length`, at which the next pass should be looked at.

        None if there is none: not asked for, never worth it, or not even an empty pool
        has room for a second copy beside what the request holds by then.
        """
        policy = self.policy
        if self._is_never_observed:
            return None
        if self.fold == 0:
            if not policy.becomes_due:
                return None
            due = policy.first_due(length)
        else:
            # With a rate the budget grows, too; what it takes is no gain.
            grown = policy.budget(length) - self.packed
            least = policy.least_gain(self.packed + grown)
            due = max(policy.growth(self.packed), grown + least)
            due = max(self.fold + due, length + 1)
            due = policy.past_whole_answer(due, self.gain(due))
        fits = policy.pass_fits(self.resident(due), policy.budget(due))
        return due if fits else None

    def gain(self, length: int) -> int:
        """Tokens by which a pass would shrink the request while it decodes."""
        return self._gain(length, self.policy.budget(length))

    def _gain(self, length: int, budget: int) -> int:
        return self.packed + floor_tokens(length) - self.fold - budget

    def propose_after_chunk(self, length: int, prompt_len: int) -> PassDecision | None:
        """Propose the pass that is worth running behind `length` tokens of a prompt.

        A pass between chunks keeps what the whole prompt may keep.

        Returns
        -------
        PassDecision or None
            None if it would not give back enough, or if not even an empty pool has room
            for its copy.
        """
        phase = Phase.CHUNK if length < prompt_len else Phase.PROMPT
        return self._propose(phase, length, self.policy.budget(prompt_len))

    def propose_while_decoding(self, length: int) -> PassDecision | None:
        """Propose the pass that is worth running at logical `length`; None as above."""
        return self._propose(Phase.DECODE, length, self.policy.budget(length))

    def _propose(self, phase: Phase, length: int, budget: int) -> PassDecision | None:
        if self._is_never_observed:
            return None
        # A chunk must make room for the next one, whatever the copy costs.
        chunk = phase is Phase.CHUNK
        least = PAGE_SIZE if chunk else self.policy.least_gain(budget)
        if self._gain(length, budget) < least:
            return None
        if not self.policy.pass_fits(self.resident(length), budget):
            return None
        window = self.policy.options.window
        return PassDecision(
            phase=phase,
            slot=self.slot,
            seq_len=length,
            fold_old=self.fold,
            fold_new=floor_tokens(length),
            packed_old=self.packed,
            packed_new=budget,
            query_start=max(self.observed, length - window, 0),
            protected=self.policy.protected(length),
            repeated=self.probed and phase is not Phase.DECODE,
            level=not self.resumed_tokens,
        )

    def launch(
        self,
        decision: PassDecision,
        req: Any,
        dest_tokens: Any,
        probe: Probe | None = None,
    ) -> PassInFlight:
        """Move the launch-order state past a pass that has its pages.

        The peak leaves out the prompt: it must be resident while it is prefilled.
        """
        if decision.phase is Phase.DECODE:
            length, resident = decision.seq_len, self.resident(decision.seq_len)
            self.peak_resident = max(self.peak_resident, resident)
            self.residency.add(self.prefilled, length, resident)
        self.fold, self.packed = decision.fold_new, decision.packed_new
        self.observed = decision.seq_len
        self.probed = self.probed or probe is not None
        self.passes += 1
        self.chunk_passes += decision.between_chunks
        launched = PassInFlight(decision, req, self, dest_tokens, probe)
        self.in_flight.append(launched)
        return launched

    def settle(self, launched: PassInFlight) -> None:
        """Move the result-order state past a pass."""
        launched.closed = True
        self.in_flight.remove(launched)
        self.settled_fold = self.own_from = launched.decision.fold_new
        self.settled_passes += 1
        self.settled_packed = launched.dest_tokens
        self.settled_blocks = launched.head_blocks
        self.settled_shares = launched.token_shares
        self.settled_offsets, self.settled_unit = launched.offsets, launched.unit

    def abandon(self) -> list[PassInFlight]:
        """Close every pass in flight; the caller must free their fresh pages."""
        dead, self.in_flight = self.in_flight, []
        for launched in dead:
            launched.closed = True
        return dead

    def end(self) -> None:
        """End: the memory is given back, and `attached.state_of` forgets the state."""
        self.kv = ENDED

    def summary(self, length: int) -> dict[str, Any]:
        """Summary that ``meta_info["kv_compress"]`` shows for logical `length`."""
        resident = self.resident(length)
        enabled, budget = self.policy.enabled, self.policy.compressed(length)
        # An answer that is whole has grown since the last pass, and its budget with it.
        held = budget if self.policy.answer else self.packed or budget
        report = {
            "enabled": enabled,
            "logical_tokens": length,
            "resident_tokens": resident,
            "peak_resident_tokens": max(self.peak_resident, resident)
            if self.fold
            else resident,
            "mean_resident_tokens": self.residency.mean(
                self.prefilled, length, resident
            ),
            "budget_tokens": held if enabled else None,
            "passes": self.passes,
            "chunk_passes": self.chunk_passes,
            "deferred_passes": self.deferred_passes,
        }
        if self.policy.options.sessions:
            report["resumed_tokens"] = self.resumed_tokens
            report["generations"] = self.generations
        if self.settled_blocks is not None:
            tokens = self.settled_blocks.flatten() * PAGE_SIZE
            report["packed_tokens_per_head"] = tokens.tolist()
            report["num_layers"] = len(self.settled_blocks)
        return report

    def prompt_token_shares(self, prompt_len: int) -> list[float]:
        """Of each prompt token, the share of all heads that hold it: 0 to 1.

        Rounded to three decimals. Before the first pass every head holds everything.
        """
        if self.settled_shares is None:
            return [1.0] * prompt_len
        shares: list[float] = (self.settled_shares.double() / 1000).tolist()
        return shares
