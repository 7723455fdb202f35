"""Snapshots in host memory: those that the pool has no room for.

A snapshot that is given up would be computed again from nothing when its user comes
back. Its pages are a rate's share of a conversation, so to copy them there and back
takes a few milliseconds. What is decided here, while a step is scheduled, the next step
does before all else, in the order in which it was decided (`Copy`): a page that one
copy frees may be what the next one writes.

Host state that ranks share. Imports neither torch nor SGLang.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.sessions.snapshot import Snapshot


class Copy(NamedTuple):
    """Pages to be copied between the pool and host memory.

    Attributes
    ----------
    slots : pages of host memory.
    tokens : token ids of as many pages of the pool, int64 [len(slots) * 16], on the
        device.
    to_host : the direction.
    """

    slots: list[int]
    tokens: Any
    to_host: bool


class HostShelf:
    """Which snapshots lie in which pages of host memory.

    Parameters
    ----------
    pages : of host memory.

    Attributes
    ----------
    pages : see there.
    wanted : a snapshot that will be brought back next, and is not given up meanwhile.
    brought_back : snapshots that were copied back to the pool, since the start.
    """

    def __init__(self, pages: int) -> None:
        self.pages, self.brought_back = pages, 0
        self.wanted: Snapshot | None = None
        self._free = list(range(pages))
        # Who was put here first is first.
        self._slots: dict[Snapshot, list[int]] = {}
        self._copies: list[Copy] = []

    def __len__(self) -> int:
        """Snapshots here."""
        return len(self._slots)

    def __contains__(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is here."""
        return snapshot in self._slots

    def tokens_of(self, snapshot: Snapshot) -> int:
        """Tokens of memory that a snapshot takes, its tail included."""
        return len(self._slots[snapshot]) * PAGE_SIZE

    def can_have(self, tokens: int) -> bool:
        """Whether there is room for so many tokens, if others go."""
        kept = self._slots.get(self.wanted, ()) if self.wanted is not None else ()
        return tokens <= (self.pages - len(kept)) * PAGE_SIZE

    def victim(self, tokens: int) -> Snapshot | None:
        """Which snapshot must go so that so many tokens find room; None if they do.

        What later turns have replaced goes first, then who was put here first.
        """
        if tokens <= len(self._free) * PAGE_SIZE:
            return None
        others = [it for it in self._slots if it is not self.wanted]
        replaced = (it for it in others if it.superseded)
        return next(replaced, next(iter(others), None))

    def put(self, snapshot: Snapshot, tokens: Any) -> None:
        """Copy pages of the pool here; there must be room for them."""
        count = len(tokens) // PAGE_SIZE
        slots, self._free = self._free[:count], self._free[count:]
        self._slots[snapshot] = slots
        self._copies.append(Copy(slots, tokens, to_host=True))

    def take(self, snapshot: Snapshot, tokens: Any) -> None:
        """Copy a snapshot to pages of the pool; it is here no longer."""
        slots = self.drop(snapshot)
        self._copies.append(Copy(slots, tokens, to_host=False))
        self.brought_back += 1

    def drop(self, snapshot: Snapshot) -> list[int]:
        """Give up a snapshot; returns the pages that it had."""
        slots = self._slots.pop(snapshot)
        self._free = sorted([*self._free, *slots])
        return slots

    def clear(self) -> None:
        """Give up all, also what has not been copied yet."""
        self._slots.clear()
        self._copies.clear()
        self._free = list(range(self.pages))

    def take_copies(self) -> list[Copy]:
        """What has to be copied before the next step, in this order; each once."""
        copies, self._copies = self._copies, []
        return copies
