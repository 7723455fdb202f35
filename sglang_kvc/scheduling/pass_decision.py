"""One eviction pass, as it was decided: numbers, and nothing of the device.

This module imports neither torch nor SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Phase(Enum):
    """Where in its life a request is compressed."""

    CHUNK = auto()  # behind a chunk of its prompt, more of which is to come
    PROMPT = auto()  # behind the whole prompt
    DECODE = auto()


@dataclass(frozen=True)
class PassDecision:
    """A pass that is worth running; tokens are per KV head on average.

    Attributes
    ----------
    phase : where in its life the request is.
    slot : row of the request in the device tables.
    seq_len : logical length at the step that carries the pass.
    fold_old, fold_new : logical tokens that are packed before and after.
    packed_old, packed_new : tokens of memory that they take; 0 before the first.
    query_start : first position whose query is observed.
    protected : last tokens that are not evicted.
    repeated : earlier passes were scored by the same queries.
    level : all layers hold equally much, as until the pass behind a prompt. What comes
        of a snapshot does not.
    """

    phase: Phase
    slot: int
    seq_len: int
    fold_old: int
    fold_new: int
    packed_old: int
    packed_new: int
    query_start: int
    protected: int
    repeated: bool
    level: bool = True

    @property
    def is_first(self) -> bool:
        """Whether it is the request's first: everything it holds is in token layout."""
        return self.packed_old == 0

    @property
    def between_chunks(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.phase is Phase.CHUNK

    @property
    def pool_tail(self) -> bool:
        """Whether scores of the tail are pooled: it is consecutive text, new to us."""
        return self.is_first or self.phase is not Phase.DECODE

    @property
    def gain(self) -> int:
        """Tokens that come back when the pass is settled; its copy is not counted."""
        return self.packed_old + self.fold_new - self.fold_old


@dataclass(frozen=True)
class Probe:
    """The end of a prompt, run before a pass between chunks; see `attention.probe`.

    Attributes
    ----------
    token_ids : its tokens.
    start : position of the first of them in the prompt.
    """

    token_ids: tuple[int, ...]
    start: int
