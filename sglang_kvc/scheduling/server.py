"""Interface of the server that scheduling works for."""

from __future__ import annotations

from typing import Protocol

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.passes import PassScheduler
from sglang_kvc.scheduling.turns import Turns


class Server(Protocol):
    """The part of the runtime that decisions need; nothing of the device.

    Attributes
    ----------
    chunk_rule : when prompts are compressed between chunks, and the size of the pool.
    pass_scheduler : passes, and what a round of admission leaves behind.
    turns : of prompts and answers.
    """

    chunk_rule: ChunkRule
    pass_scheduler: PassScheduler
    turns: Turns

    @property
    def options(self) -> KVCompressOptions:
        """The server's options."""

    @property
    def page_list_width(self) -> int:
        """Pages of the longest request: what page lists are set aside for."""
