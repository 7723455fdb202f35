"""Choose the prompts that are compressed between their chunks, and size the chunks.

A prompt normally stays whole until its last chunk is computed: its attention is exact.
A prompt that would take most of the pool, or more than all of it, is compressed after
every chunk instead: its peak is two packed copies and one chunk (`ChunkRule.peak`),
and later chunks attend to what was kept. This module imports neither torch nor SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, floor_tokens

CHUNKS_OF_POOL = 8
"""A chunk takes at most this part of the pool, so that others keep running."""

AUTO_SHARE = 2
"""``auto`` compresses a prompt between chunks if it needs 1/2 of the pool or more."""

CHUNK_SLACK = 4 * PAGE_SIZE
"""Pages that rounding and one decode step may take beside the chunk."""


@dataclass(frozen=True)
class ChunkRule:
    """Rule of a server: what is compressed between chunks, and how long chunks are.

    Parameters
    ----------
    mode : "auto", "always" or "never", see ``--kv-compress-chunks``.
    pool_tokens : tokens of the KV pool.
    chunk_size : SGLang's chunked prefill size; 0 when this server cannot compress
        between chunks (chunked prefill off, or no attention kernel for it).
    window : queries observed by a pass; a chunk is never shorter.
    """

    mode: str
    pool_tokens: int
    chunk_size: int
    window: int

    @property
    def min_chunk(self) -> int:
        """Shortest chunk worth a pass, tokens."""
        return min(ceil_tokens(4 * self.window), self.chunk_size)

    def prefers(self, prompt_len: int) -> bool:
        """Whether a prompt is compressed between chunks although it fits whole."""
        long = prompt_len * AUTO_SHARE >= self.pool_tokens
        return self.mode == "always" or (self.mode == "auto" and long)

    def chunk_tokens(self, prompt_len: int, budget: int) -> int:
        """Tokens of a chunk of this prompt; 0 if it must be prefilled whole.

        Parameters
        ----------
        prompt_len : tokens of the prompt.
        budget : tokens it may keep once it is complete, multiple of the page size.
        """
        if self.mode == "never" or not self.chunk_size:
            return 0
        # Admission leaves a page and a token beside the peak, as SGLang does.
        room = self.pool_tokens - self.peak(budget, 0) - PAGE_SIZE - 1
        chunk = min(self.chunk_size, self.pool_tokens // CHUNKS_OF_POOL, room)
        chunk = floor_tokens(max(chunk, min(self.min_chunk, room)))
        if chunk < self.min_chunk or budget + chunk >= prompt_len:
            return 0
        return chunk

    def peak(self, budget: int, chunk: int, hit: int = 0) -> int:
        """Most tokens that a prompt holds at once while it is prefilled.

        What it has (the old packed copy; before the first pass the cached prefix that
        it starts from), the new packed copy, a chunk and slack.
        """
        return max(budget, hit) + budget + chunk + CHUNK_SLACK

    def max_hit(self, budget: int, chunk: int) -> int:
        """Longest cached prefix that leaves room for the first chunk and its pass."""
        room = self.pool_tokens - self.peak(budget, chunk) + budget - PAGE_SIZE - 1
        return max(floor_tokens(room), 0)


def probe_tokens(prompt: Any, length: int, room: int) -> tuple[int, ...]:
    """Last tokens of a prompt of which `length` tokens are computed.

    Parameters
    ----------
    prompt : sequence of token ids.
    length : where the chunk ends; a probe begins a page of its own.
    room : most tokens of the probe: the window, or the pages that can hold it.
    """
    if length % PAGE_SIZE:
        return ()
    return tuple(prompt[max(length, len(prompt) - room) :])
