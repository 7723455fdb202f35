"""The snapshots that a server holds, found by their text. Host state that ranks share.

The pages are the prefix tree's; it tells the store which of them it has evicted.
Imports neither torch nor SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sglang_kvc.config.pages import PAGE_SIZE
from sglang_kvc.sessions.host import HostShelf
from sglang_kvc.sessions.snapshot import Snapshot
from sglang_kvc.sessions.text import TextChain


class SessionStore:
    """Snapshots by the digest of what they have folded, and by their node in the tree.

    Counted and listed are those in the pool; `host` has others.

    Parameters
    ----------
    host_pages : of host memory, for those that the pool has no room for.

    Attributes
    ----------
    host : what lies there; None without.
    tokens : tokens of memory that packed pages of all snapshots take.
    taken, hits, evicted : how many were taken, started from and given up to make room,
        since the start; one that a later turn replaces is not counted as evicted.
    now : the step that runs, see `scheduling.expected`.
    """

    def __init__(self, host_pages: int = 0) -> None:
        self.host = HostShelf(host_pages) if host_pages else None
        self.tokens = self.taken = self.hits = self.evicted = self.now = 0
        self._by_digest: dict[bytes, list[Snapshot]] = {}
        self._by_node: dict[Any, Snapshot] = {}
        self._whole: dict[bytes, Any] = {}

    def __len__(self) -> int:
        """Snapshots in the pool."""
        return len(self._by_node)

    def __bool__(self) -> bool:
        """Whether there is any, those in host memory included."""
        return bool(self._by_digest)

    def __iter__(self) -> Iterator[Snapshot]:
        """All of them, the oldest first."""
        return iter(self._by_node.values())

    def make(self, **attributes: Any) -> Snapshot:
        """A new snapshot, which is not held yet."""
        self.taken += 1
        return Snapshot(number=self.taken, left_at=self.now, **attributes)

    def add(self, snapshot: Snapshot, node_id: Any) -> None:
        """Hold a snapshot whose packed pages are in the tree, new or from `host`."""
        alike = self._by_digest.setdefault(snapshot.digest, [])
        if snapshot not in alike:
            alike.append(snapshot)
        self._by_node[node_id] = snapshot
        self.tokens += snapshot.packed

    def forget(self, node_id: Any, *, evicted: bool) -> None:
        """Forget the snapshot of a node that the tree gives up, if it is one."""
        snapshot = self._leave(node_id)
        if snapshot is not None:
            self._lose(snapshot, evicted=evicted)

    def move_to_host(self, node_id: Any, tokens: Any) -> None:
        """Let `host` have the snapshot of a node that the tree will give up next.

        Parameters
        ----------
        node_id : of the snapshot.
        tokens : token ids of all its pages, int64; `HostShelf.can_have` as many.
        """
        snapshot = self._leave(node_id)
        assert self.host is not None and snapshot is not None
        while (victim := self.host.victim(len(tokens))) is not None:
            self.lose_in_host(victim)
        self.host.put(snapshot, tokens)
        snapshot.node = None

    def lose_in_host(self, snapshot: Snapshot) -> None:
        """Forget a snapshot that `host` has."""
        assert self.host is not None
        self.host.drop(snapshot)
        self._lose(snapshot, evicted=not snapshot.superseded)

    def is_in_host(self, snapshot: Snapshot) -> bool:
        """Whether a snapshot is there, and not in the tree."""
        return self.host is not None and snapshot in self.host

    def _leave(self, node_id: Any) -> Snapshot | None:
        snapshot = self._by_node.pop(node_id, None)
        if snapshot is not None:
            self.tokens -= snapshot.packed
        return snapshot

    def _lose(self, snapshot: Snapshot, *, evicted: bool) -> None:
        alike = self._by_digest[snapshot.digest]
        alike.remove(snapshot)
        if not alike:
            del self._by_digest[snapshot.digest]
        self.evicted += evicted

    def clear(self) -> None:
        """Forget all: the tree was emptied."""
        self._by_digest.clear()
        self._by_node.clear()
        self._whole.clear()
        if self.host is not None:
            self.host.clear()
        self.tokens = 0

    def note_whole(self, digest: bytes, key: Any) -> None:
        """Note that the tree has a whole copy of what a request holds packed.

        Parameters
        ----------
        digest, key : of the text; the key is SGLang's.
        """
        self._whole.pop(digest, None)
        self._whole[digest] = key

    def take_whole(self) -> Iterator[Any]:
        """Keys of the whole copies that were noted, the oldest first; each once."""
        while self._whole:
            yield self._whole.pop(next(iter(self._whole)))

    def superseded(self) -> Iterator[Snapshot]:
        """Those that later turns have replaced and nobody runs on, the oldest first."""
        return iter([it for it in self if it.superseded and not it.borrowers])

    def unexpected(self) -> Iterator[Snapshot]:
        """Those that nobody is expected to start from, first who left first."""
        return iter([it for it in self.idle() if it.overdue and it.is_private])

    def idle(self) -> Iterator[Snapshot]:
        """Those that nobody runs on and that go on in one way, first who left first."""
        found = [it for it in self if not it.borrowers and not it.branches]
        return iter(sorted(found, key=lambda it: it.left_at))

    def along(
        self, text: TextChain, ids: Sequence[int], length: int
    ) -> Iterator[Snapshot]:
        """Snapshots of prefixes of a text, the longest fold first.

        Parameters
        ----------
        text, ids : the text, and its tokens.
        length : most tokens of a prefix.
        """
        if not self._by_digest:
            return
        for fold in range(length // PAGE_SIZE * PAGE_SIZE, 0, -PAGE_SIZE):
            found = self._by_digest.get(text.prefix(ids, fold), ())
            # The newest first; the list may change meanwhile.
            yield from reversed(tuple(found))

    def replaced_by(
        self, text: TextChain, ids: Sequence[int], fold: int
    ) -> list[Snapshot]:
        """Snapshots that another one of this text makes superfluous.

        Those of prefixes of it that are private; others are left to the order of
        eviction.
        """
        return [it for it in self.along(text, ids, fold) if it.is_private]
