"""What is asked of the prefix tree that holds snapshots. Imports no SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from sglang_kvc.sessions.snapshot import Hit, Snapshot
from sglang_kvc.sessions.store import SessionStore


class SnapshotTree(Protocol):
    """SGLang's prefix tree with branches of snapshots, see `sessions.snapshot`.

    Attributes
    ----------
    sessions : the snapshots held; None if the tree is to hold none.
    disable : whether it keeps no prefix.
    """

    sessions: SessionStore | None
    disable: bool

    def find_branch(self, snapshot: Snapshot, tail: Sequence[int]) -> Hit | None:
        """Find how far a snapshot continues with a text; this counts as a use of it."""

    def bring_back(self, snapshot: Snapshot) -> bool:
        """Take a snapshot back from host memory, if there is room for it."""

    def evictable_size(self) -> int:
        """Tokens that nobody has locked."""

    def hold(self, node: Any) -> Any:
        """Lock a node and all before it; returns what `let_go` takes."""

    def let_go(self, lock: Any) -> None:
        """Undo `hold`."""
