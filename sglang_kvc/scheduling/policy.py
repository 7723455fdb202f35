"""Policy of a request: what it asked for, on this server.

This module imports neither torch nor SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from sglang_kvc.config.options import KVCompressOptions
from sglang_kvc.config.pages import PAGE_SIZE, ceil_tokens, floor_tokens
from sglang_kvc.requests.request_options import RequestOptions, resolve_budget
from sglang_kvc.scheduling.chunking import ChunkRule
from sglang_kvc.scheduling.lengths import LATE_PASS_SLACK, UNLIMITED

PASS_SHARE = 64
"""A pass gives back at least this part of what it copies (1/64), and then only runs."""

LONGEST = 1 << 31
"""Longer than any request; where searches end."""


@dataclass(frozen=True)
class RequestPolicy:
    """Policy of one request: when and how far it is compressed; fixed for its life.

    Attributes
    ----------
    options : the server's options.
    request : what the request asked for.
    chunk_rule : when prompts are compressed between chunks, and the size of the pool
        without the ring; None: never, in a pool without end.
    ring_tokens : of the pool, that its last queries take while it may be compressed.
    least_budget : tokens that it keeps at least: those of the snapshot that it has
        started from, which its passes do not shrink.
    prompt_len : tokens of its prompt; what follows is its answer.
    delay : tokens of its answer that its first pass waits for. `course.delayed` says
        who waits; then it stays so. What starts from a snapshot does not wait.
    """

    options: KVCompressOptions
    request: RequestOptions
    chunk_rule: ChunkRule | None = None
    ring_tokens: int = 0
    least_budget: int = 0
    prompt_len: int = UNLIMITED
    delay: int = 0

    @property
    def whole_pool(self) -> int:
        """Tokens of the KV pool."""
        return self.pool_tokens + self.ring_tokens

    @property
    def pool_tokens(self) -> int:
        """Tokens of the KV pool beside the request's ring."""
        return self.chunk_rule.pool_tokens if self.chunk_rule is not None else UNLIMITED

    @property
    def enabled(self) -> bool:
        """Whether the request may be compressed; else it keeps everything."""
        return self.request.enabled

    @property
    def leaves(self) -> str:
        """What the request leaves in the pool, one of `request_options.LEAVES`."""
        if self.request.leaves is not None:
            return self.request.leaves
        return "compressed" if self.options.sessions and self.enabled else "whole"

    @property
    def resumes(self) -> bool:
        """Whether it may start from a snapshot; whose tokens stood where is unknown."""
        request = self.request
        if not self.options.sessions or not self.enabled or request.report_tokens:
            return False
        return request.resume is not False

    @cached_property
    def answer(self) -> int:
        """Last tokens of the answer that stay whole at most, in whole pages."""
        asked = self.request.answer
        return ceil_tokens(self.options.answer if asked is None else asked)

    @cached_property
    def whole_until(self) -> int:
        """Logical length up to which nothing of the answer is to be evicted."""
        return floor_tokens(self.prompt_len) + self.answer

    @property
    def asked_delay(self) -> int:
        """Decoded tokens that the first pass is to wait for, if it can."""
        if not self.enabled:
            return 0
        asked = self.request.delay
        return self.options.delay if asked is None else asked

    def waits(self, length: int) -> bool:
        """Whether no pass is to come at logical `length`, for want of an answer."""
        if not self.delay or self.least_budget:
            return False
        return length < self.prompt_len + self.delay

    def budget(self, length: int) -> int:
        """Tokens to keep per KV head at logical `length`; all: `UNLIMITED`.

        That is what is not enabled, and what waits for its answer.
        """
        return UNLIMITED if self.waits(length) else self.compressed(length)

    def compressed(self, length: int) -> int:
        """Tokens to keep at logical `length`, whether passes wait or not.

        The answer's last pages are kept beside what rate or budget say of all before
        them. Its pages begin where the pass behind the prompt folds, so as it grows
        that pass has nothing to take back.
        """
        before = length
        if length > self.prompt_len:
            before = max(length - self.answer, self.prompt_len)
        budget = resolve_budget(self.request, self.options, before)
        if budget is None:
            return UNLIMITED
        return max(budget, self.least_budget) + self._answer_share(length)

    def _answer_share(self, length: int) -> int:
        """Tokens, in whole pages, that the budget holds for the answer alone."""
        decoded = floor_tokens(length) - floor_tokens(self.prompt_len)
        return min(max(decoded, 0), self.answer)

    def past_whole_answer(self, due: int, gain: int) -> int:
        """Length at which a pass that is due at `due` and gains so much is worth it.

        Until the answer has outgrown its share, what is decoded is no gain.
        """
        whole = self.whole_until
        if not self.answer or due >= whole:
            return due
        if gain >= self.least_gain(self.budget(due)):
            return due
        return whole + max(self.growth(self.budget(whole)) - gain, 1)

    def protected(self, length: int) -> int:
        """Last tokens that no pass at logical `length` evicts."""
        answer = min(max(length - self.prompt_len, 0), self.answer)
        return max(self.options.protected, answer)

    def growth(self, budget: int) -> int:
        """Tokens of the tail, in whole pages, that make a pass due: the interval.

        With a large budget more: a pass copies all of it.
        """
        return max(ceil_tokens(self.options.interval), self.least_gain(budget))

    def least_gain(self, budget: int) -> int:
        """Tokens, in whole pages, that a pass must give back to be worth its copy."""
        return max(PAGE_SIZE, ceil_tokens(-(-budget // PASS_SHARE)))

    def compresses(self, length: int) -> bool:
        """Whether a pass at logical `length` is worth it if all tokens are there."""
        budget = self.budget(length)
        return floor_tokens(length) - budget >= self.least_gain(budget)

    @cached_property
    def becomes_due(self) -> bool:
        """Whether a first pass is worth it at some length of the request."""
        return self._is_worth(LONGEST)

    def first_due(self, length: int) -> int:
        """Logical length at which an uncompressed request should be looked at again.

        Only for what `becomes_due`: else there is none.
        """
        assert self.becomes_due
        return max(self._worth_from, length + 1)

    @cached_property
    def _worth_from(self) -> int:
        """Logical length from which a first pass gives back what makes passes due."""
        return _first(self._is_worth, LONGEST)

    def _is_worth(self, length: int) -> bool:
        """Whether a first pass gives back what makes passes due."""
        budget = self.budget(length)
        return floor_tokens(length) - budget >= self.growth(budget)

    @cached_property
    def passes_end(self) -> bool:
        """Whether later passes find no room from some length on."""
        return self._is_full(LONGEST)

    @cached_property
    def last_pass(self) -> int:
        """Logical length up to which a later pass finds room for a second copy.

        `UNLIMITED` unless `passes_end`.
        """
        return _first(self._is_full, LONGEST) - 1 if self.passes_end else UNLIMITED

    def _is_full(self, length: int) -> bool:
        """Whether the pool has no room for a second copy at logical `length`."""
        # Without the delay: the condition must rise with the length.
        budget = self.compressed(length)
        return (
            2 * budget + self.growth(budget) + 2 * LATE_PASS_SLACK >= self.pool_tokens
        )

    def pass_fits(self, held: int, budget: int) -> bool:
        """Whether `held` tokens and a packed copy fit in a pool that is else empty."""
        return ceil_tokens(held) + budget + PAGE_SIZE <= self.pool_tokens


def _first(holds: Callable[[int], bool], high: int) -> int:
    """Least length for which a rising condition holds; it does at `high`."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
