"""Plan of what a step of the worker does besides its forward."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sglang_kvc.scheduling.request_state import PassInFlight
from sglang_kvc.scheduling.rings import Ring
from sglang_kvc.sessions.host import Copy
from sglang_kvc.sessions.snapshot import Snapshot


class Fold(NamedTuple):
    """What a request holds as packed blocks.

    Attributes
    ----------
    tokens : logical tokens that are folded.
    packed : tokens kept per head, on average; they take as many of memory.
    """

    tokens: int
    packed: int


class Resumed(NamedTuple):
    """A slot whose request starts from a snapshot.

    Attributes
    ----------
    slot : row of the request in the device tables.
    snapshot : what it starts from.
    packed_tokens : token ids of the packed pages, int64 [snapshot.packed].
    """

    slot: int
    snapshot: Snapshot
    packed_tokens: Any


@dataclass
class StepPlan:
    """Plan of a step, made while it is scheduled, carried out by `attention.step`.

    Attributes
    ----------
    copies : of snapshots to host memory and back, before all else.
    reset_slots : slots whose owner changed; they lose their ring.
    resumed : those of them that start from snapshots.
    rings : rings that slots have got, after that.
    passes : eviction passes to run behind the forward.
    folds : in a prefill step with compressed prompts, each request's fold before the
        step's passes; empty otherwise.
    """

    copies: list[Copy] = field(default_factory=list)
    reset_slots: list[int] = field(default_factory=list)
    resumed: list[Resumed] = field(default_factory=list)
    rings: dict[int, Ring] = field(default_factory=dict)
    passes: list[PassInFlight] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)

    def digest(self) -> int:
        """Return a number that differs, almost surely, if another rank plans otherwise.

        It reads the pages of passes and rings, which waits for a GPU: for checks only.
        """
        passes = [
            (it.decision, it.probe, it.req.rid, it.dest_tokens.tolist())
            for it in self.passes
        ]
        resumed = [
            (it.slot, it.snapshot.number, it.packed_tokens.tolist())
            for it in self.resumed
        ]
        copies = [(it.slots, it.tokens.tolist(), it.to_host) for it in self.copies]
        rings = {slot: it.token_ids.tolist() for slot, it in self.rings.items()}
        facts = (copies, self.reset_slots, resumed, rings, self.folds, passes)
        return zlib.crc32(repr(facts).encode())
