"""What is left of a compressed request, for others to start from.

A snapshot lives in SGLang's prefix tree, in a branch of its own that no prompt reaches.
Its first node holds the packed pages, whose place in the key is taken by as many zeros;
behind it come ordinary token pages, under the text behind the fold::

    root ── packed pages (C tokens of memory, text [0, f))
              ├── token pages of text [f, n)
              └── token pages of another continuation

So the tree's own locks, sums, order of eviction and flush are those of snapshots.
Imports neither torch nor SGLang.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SHARED = 2
"""So many requests that have started from a snapshot show that it is no one's own."""


@dataclass(eq=False)
class Snapshot:
    """Packed KVs of a text, and what a slot's tables must say to read them.

    Attributes
    ----------
    number : of all snapshots that this server has taken.
    digest : of the text that is folded, see `TextChain`.
    fold : tokens of that text, a multiple of the page size.
    packed : tokens of memory that they take.
    offsets : int32 [L * H + 1] on the device, a row of ``block_offsets``.
    unit : fp32 scalar on the device, the slot's ``novelty_unit``; None without.
    passes : how many have made it.
    turns : how many the conversation has had since it was computed from nothing.
    node : SGLang's handle of the node with the packed pages.
    tail : the text behind the fold that the longest continuation has pages of.
    superseded : a later turn has left another one, so this goes before others.
    branches : whether continuations with another text may have been added.
    borrowers : requests that run on it, or wait for their turn to.
    resumed : requests that have started from it.
    left_at : step in which the last request that ran on it, or made it, has ended.
    overdue : nobody has come back to it in the time in which that was expected.
    """

    number: int
    digest: bytes
    fold: int
    packed: int
    offsets: Any
    unit: Any
    passes: int
    turns: int = 1
    node: Any = None
    tail: array[int] = field(default_factory=lambda: array("q"))
    superseded: bool = False
    branches: bool = False
    borrowers: int = 0
    resumed: int = 0
    left_at: int = 0
    overdue: bool = False

    @property
    def is_private(self) -> bool:
        """Whether it goes on in one way only, and nobody is to start from it.

        One that several requests have started from is where conversations part.
        """
        shared = self.branches or self.resumed >= SHARED
        return not self.borrowers and not shared

    @property
    def branch(self) -> str:
        """Name of its branch of the prefix tree."""
        return f"kv-compress snapshot {self.number}"

    def key(self, tail: Sequence[int] = ()) -> array[int]:
        """Key of a continuation: zeros for the packed pages, then its text."""
        return array("q", [0]) * self.packed + array("q", tail)

    def grow(self, tail: Sequence[int]) -> None:
        """Note the text of a continuation that was added."""
        added = array("q", tail)
        short, long = sorted((self.tail, added), key=len)
        self.branches = self.branches or long[: len(short)] != short
        self.tail = long


class Hit(NamedTuple):
    """A snapshot as far as a request can start from it.

    Attributes
    ----------
    snapshot : the snapshot.
    tokens : of the text, those in a continuation's pages included; whole pages.
    node : SGLang's handle of the last node; a lock on it is one on all before it.
    pages : token ids of what these tokens take, int64 [held], the packed ones first.
    """

    snapshot: Snapshot
    tokens: int
    node: Any
    pages: Any

    @property
    def held(self) -> int:
        """Tokens of memory that they take."""
        return self.snapshot.packed + self.tokens - self.snapshot.fold

    @property
    def packed_tokens(self) -> Any:
        """Token ids of the packed pages."""
        return self.pages[: self.snapshot.packed]
